//! A run as text for people.

use super::Report;
use super::load::Ended;
use super::statistics::Quantiles;
use crate::table::Table;

pub fn render(report: &Report) -> String {
    let s = &report.summary;
    let mut out = format!(
        "{} at {}, {}\n{} of {} requests served in {:.1} s, {:.0} tokens in and {:.0} out each\n",
        report.model,
        report.options.url,
        report.load,
        s.served,
        s.requests,
        s.window_s,
        s.mean_prompt_tokens,
        s.mean_output_tokens
    );
    out.push_str(&format!(
        "{:.1} output tok/s, {:.1} prompt tok/s, {:.2} requests/s\n",
        s.output_tok_s, s.prompt_tok_s, s.served_per_s
    ));
    if let (Some(slo), Some(goodput)) = (&report.options.slo, &s.goodput) {
        let (share, per_s) = (100.0 * goodput.share, goodput.per_s);
        out.push_str(&format!("goodput under {slo}: {share:.1} %, {per_s:.2} requests/s\n"));
    }
    for (kind, n) in &s.errors {
        out.push_str(&format!("failed, {kind}: {n}\n"));
    }
    if let Some(Ended { requests, failed }) = report.beside {
        let (rate, tokens) = (report.options.beside_rate, report.options.beside_tokens);
        let rate = rate.unwrap_or_default();
        out.push_str(&format!(
            "beside: {requests} prompts of {tokens} tokens, {rate} a second; {failed} failed\n"
        ));
    }
    if s.wrong_length > 0 {
        out.push_str(&format!(
            "{} answers were not {} tokens long; this endpoint ends them itself\n",
            s.wrong_length, report.options.output_tokens
        ));
    }
    let mut table = Table::new(&["ms", "mean", "p50", "p90", "p95", "p99", "max"]);
    for (name, quantiles) in
        [("TTFT", &s.ttft_ms), ("ITL", &s.itl_ms), ("TPOT", &s.tpot_ms), ("E2E", &s.e2e_ms)]
    {
        if let Some(Quantiles { n: _, mean, p50, p90, p95, p99, max }) = quantiles {
            let figures = [mean, p50, p90, p95, p99, max].map(|ms| format!("{ms:.1}"));
            table.row(std::iter::once(name.to_owned()).chain(figures).collect());
        }
    }
    out.push('\n');
    out.push_str(&table.render("no request was served"));
    out
}
