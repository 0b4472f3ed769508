//! What the field's figures are, computed from what was seen of each request. Pure.
//!
//! Times are seconds since the measured part began.

use std::collections::BTreeMap;

use serde::Serialize;

use super::slo::Slo;

/// One request as its client saw it.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub sent_s: f64,
    pub end_s: f64,
    /// Or the kind of failure.
    pub result: Result<Served, String>,
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Served {
    /// Request sent to first token.
    pub ttft: f64,
    /// Between tokens as received: several that come together are one.
    pub gaps: Vec<f64>,
    /// Request sent to last token.
    pub e2e: f64,
    /// By the server's count, as `n_output`.
    pub n_prompt: u64,
    pub n_output: u64,
}

impl Served {
    /// Mean time of a token after the first; an answer of one token has none.
    pub fn tpot(&self) -> Option<f64> {
        (self.n_output > 1).then(|| (self.e2e - self.ttft) / (self.n_output - 1) as f64)
    }
}

/// A distribution in milliseconds, by nearest rank.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Quantiles {
    pub n: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Quantiles {
    /// Of seconds; `None` of nothing.
    pub fn of(mut seconds: Vec<f64>) -> Option<Self> {
        seconds.sort_unstable_by(f64::total_cmp);
        let max = 1e3 * seconds.last()?;
        let at = |part| 1e3 * nearest_rank(&seconds, part);
        let mean = 1e3 * seconds.iter().sum::<f64>() / seconds.len() as f64;
        let n = seconds.len();
        Some(Self { n, mean, p50: at(0.5), p90: at(0.9), p95: at(0.95), p99: at(0.99), max })
    }
}

/// The smallest value that `part` of all values do not exceed.
pub fn nearest_rank(sorted: &[f64], part: f64) -> f64 {
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// What became of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// First request sent to last answer ended, seconds.
    pub window_s: f64,
    pub requests: usize,
    pub served: usize,
    /// By kind.
    pub errors: BTreeMap<String, usize>,
    /// Answers of another length than asked for.
    pub wrong_length: usize,
    pub mean_prompt_tokens: f64,
    pub mean_output_tokens: f64,
    pub served_per_s: f64,
    pub output_tok_s: f64,
    pub prompt_tok_s: f64,
    pub ttft_ms: Option<Quantiles>,
    pub itl_ms: Option<Quantiles>,
    pub tpot_ms: Option<Quantiles>,
    pub e2e_ms: Option<Quantiles>,
    /// With an SLO.
    pub goodput: Option<Goodput>,
}

/// Requests that kept the SLO; those that failed did not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goodput {
    pub share: f64,
    pub per_s: f64,
}

impl Summary {
    /// `None` if there was no request.
    pub fn of(outcomes: &[Outcome], n_output: u64, slo: Option<&Slo>) -> Option<Self> {
        let first = outcomes.iter().map(|o| o.sent_s).reduce(f64::min)?;
        let last = outcomes.iter().map(|o| o.end_s).reduce(f64::max)?;
        let window_s = (last - first).max(1e-9);
        let served: Vec<&Served> =
            outcomes.iter().filter_map(|outcome| outcome.result.as_ref().ok()).collect();
        let mut errors = BTreeMap::new();
        for outcome in outcomes {
            if let Err(kind) = &outcome.result {
                *errors.entry(kind.clone()).or_default() += 1;
            }
        }
        let n_prompt_tokens = served.iter().map(|s| s.n_prompt).sum::<u64>() as f64;
        let n_output_tokens = served.iter().map(|s| s.n_output).sum::<u64>() as f64;
        let n_served = served.len();
        let goodput = slo.map(|slo| {
            let n_good = served.iter().filter(|served| slo.is_met_by(served)).count() as f64;
            Goodput { share: n_good / outcomes.len() as f64, per_s: n_good / window_s }
        });
        Some(Self {
            window_s,
            requests: outcomes.len(),
            served: n_served,
            errors,
            wrong_length: served.iter().filter(|served| served.n_output != n_output).count(),
            mean_prompt_tokens: n_prompt_tokens / n_served.max(1) as f64,
            mean_output_tokens: n_output_tokens / n_served.max(1) as f64,
            served_per_s: n_served as f64 / window_s,
            output_tok_s: n_output_tokens / window_s,
            prompt_tok_s: n_prompt_tokens / window_s,
            ttft_ms: Quantiles::of(served.iter().map(|s| s.ttft).collect()),
            itl_ms: Quantiles::of(served.iter().flat_map(|s| s.gaps.clone()).collect()),
            tpot_ms: Quantiles::of(served.iter().filter_map(|s| s.tpot()).collect()),
            e2e_ms: Quantiles::of(served.iter().map(|s| s.e2e).collect()),
            goodput,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use super::*;

    /// Two answers, one too short, and two failures over ten seconds.
    pub fn outcomes() -> Vec<Outcome> {
        let failed = |sent_s, kind: &str| Outcome {
            sent_s,
            end_s: sent_s + 0.1,
            result: Err(kind.to_owned()),
        };
        let served = |sent_s, ttft, gaps: &[f64]| {
            let e2e = ttft + gaps.iter().sum::<f64>();
            let n_output = gaps.len() as u64 + 1;
            let served = Served { ttft, gaps: gaps.to_vec(), e2e, n_prompt: 100, n_output };
            Outcome { sent_s, end_s: sent_s + e2e, result: Ok(served) }
        };
        vec![
            served(1.0, 1.0, &[1.0, 2.0]),
            failed(2.0, "refused"),
            served(5.0, 4.0, &[2.0]),
            failed(3.0, "refused"),
        ]
    }

    #[test]
    fn quantiles_are_of_the_nearest_rank() {
        let of = |n: u32| Quantiles::of((1..=n).rev().map(|x| f64::from(x) / 1e3).collect());
        for (n, p50, p90, p99, max) in
            [(1, 1.0, 1.0, 1.0, 1.0), (4, 2.0, 4.0, 4.0, 4.0), (200, 100.0, 180.0, 198.0, 200.0)]
        {
            let q = of(n).unwrap();
            for (figure, expected) in [(q.p50, p50), (q.p90, p90), (q.p99, p99), (q.max, max)] {
                assert!((figure - expected).abs() < 1e-9, "{n}: {q:?}");
            }
        }
        assert_eq!(of(0), None);
    }

    #[test]
    fn figures_are_those_of_the_field() {
        let slo = "ttft=2s".parse().unwrap();
        let summary = Summary::of(&outcomes(), 3, Some(&slo)).unwrap();
        assert_eq!((summary.requests, summary.served, summary.wrong_length), (4, 2, 1));
        assert_eq!(summary.errors, BTreeMap::from([("refused".to_owned(), 2)]));
        assert_eq!(summary.window_s, 10.0);
        assert_eq!(summary.output_tok_s, 0.5);
        assert_eq!(summary.served_per_s, 0.2);
        assert_eq!(summary.ttft_ms.unwrap().max, 4000.0);
        let itl = summary.itl_ms.unwrap();
        assert_eq!((itl.n, itl.p50, itl.max), (3, 2000.0, 2000.0));
        assert_eq!(summary.tpot_ms.unwrap().p50, 1500.0);
        assert_eq!(summary.goodput, Some(Goodput { share: 0.25, per_s: 0.1 }));
    }

    #[test]
    fn failures_alone_are_still_counted() {
        let failed: Vec<_> = outcomes().into_iter().filter(|o| o.result.is_err()).collect();
        let summary = Summary::of(&failed, 3, None).unwrap();
        assert_eq!((summary.served, summary.errors["refused"]), (0, 2));
        assert_eq!((summary.ttft_ms, summary.goodput), (None, None));
        assert!(Summary::of(&[], 3, None).is_none());
    }
}
