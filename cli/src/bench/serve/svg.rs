//! The distributions of TTFT and ITL: the share of all (upwards) that took at most so long, on a
//! logarithmic scale. One SVG file, written as text.

use std::fmt::Write;

use super::statistics::nearest_rank;
use crate::bench::svg::{line, text};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 480.0;
/// The plot within the picture: left, top, right, bottom.
const PLOT: [f64; 4] = [60.0, 50.0, 870.0, 420.0];
/// Points of a curve.
const N_POINTS: usize = 200;
/// Shortest time drawn, seconds.
const SHORTEST: f64 = 1e-4;

/// The picture of named samples in seconds; nothing if all are empty.
pub fn render(title: &str, series: &[(&str, &str, Vec<f64>)]) -> Option<String> {
    let all = || series.iter().flat_map(|(_, _, seconds)| seconds.iter().copied());
    let lowest = all().reduce(f64::min)?.max(SHORTEST);
    let highest = all().reduce(f64::max)?.max(SHORTEST);
    let ends = [lowest.log10().floor(), (highest.log10() + 1e-9).ceil().max(lowest.log10() + 1.0)];
    let [left, top, right, bottom] = PLOT;
    let x_at = |seconds: f64| {
        let part = (seconds.max(SHORTEST).log10() - ends[0]) / (ends[1] - ends[0]);
        left + part.clamp(0.0, 1.0) * (right - left)
    };
    let y_at = |part: f64| bottom - part * (bottom - top);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text(&mut svg, [left, 28.0], "start", 14, title);
    for percent in [0, 50, 90, 99, 100] {
        let y = y_at(f64::from(percent) / 100.0);
        line(&mut svg, [left, y, right, y], "#e4e4e4", 1.0);
        if percent != 99 {
            text(&mut svg, [left - 8.0, y + 4.0], "end", 12, &format!("{percent} %"));
        }
    }
    for decade in ends[0] as i32..=ends[1] as i32 {
        for step in [1.0, 2.0, 5.0] {
            let seconds = step * 10f64.powi(decade);
            if seconds.log10() <= ends[1] + 1e-9 {
                let x = x_at(seconds);
                line(&mut svg, [x, top, x, bottom], "#e4e4e4", 1.0);
                let ms = format!("{:.3}", seconds * 1e3);
                let ms = ms.trim_end_matches('0').trim_end_matches('.');
                text(&mut svg, [x, bottom + 18.0], "middle", 12, ms);
            }
        }
    }
    text(&mut svg, [(left + right) / 2.0, bottom + 42.0], "middle", 13, "milliseconds");
    for (nth, (name, colour, seconds)) in series.iter().enumerate() {
        let mut sorted = seconds.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        if sorted.is_empty() {
            continue;
        }
        let points = (1..=N_POINTS).map(|i| {
            let part = i as f64 / N_POINTS as f64;
            format!("{:.1},{:.1}", x_at(nearest_rank(&sorted, part)), y_at(part))
        });
        let points = points.collect::<Vec<_>>().join(" ");
        writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        )
        .expect("text can be written to a string");
        let y = top + 20.0 + 18.0 * nth as f64;
        line(&mut svg, [left + 12.0, y - 4.0, left + 36.0, y - 4.0], colour, 2.0);
        text(&mut svg, [left + 42.0, y], "start", 12, name);
    }
    svg.push_str("</svg>\n");
    Some(svg)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_distribution_is_a_curve_within_the_plot() {
        let series = [
            ("TTFT", "#1f77b4", vec![0.5, 4.0, 0.0]),
            ("ITL", "#d62728", vec![0.02]),
            ("", "", vec![]),
        ];
        let svg = render("a <name>", &series).unwrap();
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("a &lt;name&gt;") && !svg.contains("NaN") && !svg.contains("inf"));
        for points in svg.split("points=\"").skip(1) {
            for point in points.split('"').next().unwrap().split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((PLOT[0]..=PLOT[2]).contains(&x) && (PLOT[1]..=PLOT[3]).contains(&y));
            }
        }
        assert!(render("", &[("ITL", "", vec![])]).is_none());
    }
}
