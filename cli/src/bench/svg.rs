//! The roofline plot (Williams et al. 2009): what the machine allows at each number of operations a
//! byte, and where every measurement stands below it. One SVG file, written as text.

use std::fmt::Write;

use super::report::{Ceilings, Report};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 620.0;
/// The plot within the picture: left, top, right, bottom.
const PLOT: [f64; 4] = [70.0, 50.0, 720.0, 560.0];
/// Of operations a byte.
const X: [f64; 2] = [0.5, 8192.0];
const COLOURS: [&str; 12] = [
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf",
    "#bcbd22", "#7f7f7f", "#000000", "#66aa88",
];

/// A measurement.
struct Dot {
    /// What its colour means: a model, a format.
    series: String,
    /// Shown when pointed at.
    title: String,
    intensity: f64,
    ops_per_s: f64,
    mark: Mark,
}

/// What a dot looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// A filled circle: a whole model.
    Model,
    /// An empty square: a layer alone, from memory.
    Far,
    /// An empty diamond: a layer alone, from caches.
    Near,
}

/// The picture; nothing if there are no ceilings to draw.
pub fn render(report: &Report) -> Option<String> {
    let ceilings = report.machine.threads.last()?;
    let dots = dots(report);
    let highest = ceilings.peaks.iter().map(|peak| peak.ops_per_s).fold(1e10, f64::max);
    let lowest = dots.iter().map(|dot| dot.ops_per_s).fold(highest / 300.0, f64::min);
    let axes = Axes { y: [lowest / 1.5, highest * 1.8] };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    let title = format!("{}, {} threads", report.machine.cpu, ceilings.n_threads);
    text(&mut svg, [PLOT[0], 28.0], "start", 16, &title);
    axes.grid(&mut svg);
    axes.roofs(&mut svg, ceilings);
    axes.dots(&mut svg, &dots);
    svg.push_str("</svg>\n");
    Some(svg)
}

fn dots(report: &Report) -> Vec<Dot> {
    let mut dots = Vec::new();
    for model in &report.models {
        for laid in &model.splits {
            for work in &laid.work {
                let name = model.model.trim_start_matches("synthetic:");
                let name = name.rsplit('/').next().unwrap_or(name);
                dots.push(Dot {
                    series: name.to_owned(),
                    title: format!("{name}, {}, {} {}", laid.split, work.what, work.n),
                    intensity: work.ops_per_s / work.bytes_per_s,
                    ops_per_s: work.ops_per_s,
                    mark: Mark::Model,
                });
            }
        }
    }
    for kernel in &report.kernels {
        let (format, m) = (kernel.format, kernel.m);
        let shape = format!("{} x {}", kernel.rows, kernel.columns);
        dots.push(Dot {
            series: format!("{format} layers"),
            title: format!("{format}, {shape}, {m} rows, {}", kernel.place),
            intensity: kernel.ops_per_s / kernel.bytes_per_s,
            ops_per_s: kernel.ops_per_s,
            mark: if kernel.place == "far" { Mark::Far } else { Mark::Near },
        });
    }
    dots
}

struct Axes {
    /// Of operations per second.
    y: [f64; 2],
}

impl Axes {
    fn x_at(intensity: f64) -> f64 {
        let part = (intensity / X[0]).ln() / (X[1] / X[0]).ln();
        PLOT[0] + part.clamp(0.0, 1.0) * (PLOT[2] - PLOT[0])
    }

    fn y_at(&self, ops_per_s: f64) -> f64 {
        let part = (ops_per_s / self.y[0]).ln() / (self.y[1] / self.y[0]).ln();
        PLOT[3] - part.clamp(0.0, 1.0) * (PLOT[3] - PLOT[1])
    }

    fn grid(&self, svg: &mut String) {
        let [left, top, right, bottom] = PLOT;
        for power in 0..=13 {
            let intensity = f64::from(1 << power);
            let x = Self::x_at(intensity);
            line(svg, [x, top, x, bottom], "#e4e4e4", 1.0);
            text(svg, [x, bottom + 18.0], "middle", 12, &intensity.to_string());
        }
        let mut ops = 1e9;
        while ops <= self.y[1] {
            for step in [1.0, 2.0, 5.0] {
                let at = ops * step;
                if (self.y[0]..=self.y[1]).contains(&at) {
                    let y = self.y_at(at);
                    line(svg, [left, y, right, y], "#e4e4e4", 1.0);
                    text(svg, [left - 8.0, y + 4.0], "end", 12, &(at / 1e12).to_string());
                }
            }
            ops *= 10.0;
        }
        let under = "operations a byte of weights and cache";
        text(svg, [(left + right) / 2.0, bottom + 42.0], "middle", 13, under);
        text(svg, [left - 8.0, top - 6.0], "end", 13, "TOPS");
    }

    /// The slope of memory, and a level for each kind of arithmetic.
    fn roofs(&self, svg: &mut String, ceilings: &Ceilings) {
        let highest = ceilings.peaks.iter().map(|peak| peak.ops_per_s).fold(1e10, f64::max);
        let bend = |ops: f64| (ops / ceilings.read_best).clamp(X[0], X[1]);
        let from = X[0].max(self.y[0] / ceilings.read_best);
        let to = bend(highest);
        let ends = [from, from * ceilings.read_best, to, to * ceilings.read_best];
        let ends =
            [Self::x_at(ends[0]), self.y_at(ends[1]), Self::x_at(ends[2]), self.y_at(ends[3])];
        line(svg, ends, "#333", 2.0);
        let name = format!("memory {:.1} GB/s", ceilings.read_best / 1e9);
        let middle = [(ends[0] + ends[2]) / 2.0 - 8.0, (ends[1] + ends[3]) / 2.0 - 8.0];
        text(svg, middle, "end", 12, &name);
        for peak in &ceilings.peaks {
            let y = self.y_at(peak.ops_per_s);
            line(svg, [Self::x_at(bend(peak.ops_per_s)), y, PLOT[2], y], "#333", 1.5);
            let name = format!("{} {} {:.2}", peak.kind, peak.instruction, peak.ops_per_s / 1e12);
            text(svg, [PLOT[2] - 4.0, y - 4.0], "end", 11, &name);
        }
    }

    fn dots(&self, svg: &mut String, dots: &[Dot]) {
        let mut series: Vec<(&str, Mark)> = Vec::new();
        for dot in dots {
            if !series.iter().any(|(known, _)| *known == dot.series) {
                series.push((&dot.series, dot.mark));
            }
        }
        let colour_of = |name: &str| {
            let at = series.iter().position(|(known, _)| *known == name).unwrap_or(0);
            COLOURS[at % COLOURS.len()]
        };
        if dots.iter().any(|dot| dot.mark != Mark::Model) {
            let what = "circle: model; square, diamond: a layer alone, from memory, from caches";
            text(svg, [PLOT[2], 28.0], "middle", 11, what);
        }
        for dot in dots {
            let (x, y) = (Self::x_at(dot.intensity), self.y_at(dot.ops_per_s));
            mark(svg, [x, y], colour_of(&dot.series), dot.mark, &dot.title);
        }
        for (i, (name, kind)) in series.iter().enumerate() {
            let y = PLOT[1] + 10.0 + 18.0 * i as f64;
            if y > HEIGHT - 10.0 {
                break; // The dots still say what they are when pointed at.
            }
            mark(svg, [PLOT[2] + 20.0, y], colour_of(name), *kind, name);
            text(svg, [PLOT[2] + 32.0, y + 4.0], "start", 12, name);
        }
    }
}

fn mark(svg: &mut String, [x, y]: [f64; 2], colour: &str, mark: Mark, title: &str) {
    let title = escape(title);
    let turned = if mark == Mark::Near { 45 } else { 0 };
    let written = match mark {
        Mark::Model => writeln!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\" \
             fill-opacity=\"0.8\"><title>{title}</title></circle>"
        ),
        Mark::Far | Mark::Near => writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7\" height=\"7\" fill=\"none\" \
             stroke=\"{colour}\" stroke-width=\"1.5\" \
             transform=\"rotate({turned} {x:.1} {y:.1})\"><title>{title}</title></rect>",
            x - 3.5,
            y - 3.5
        ),
    };
    written.expect("text can be written to a string");
}

pub(super) fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], colour: &str, width: f64) {
    writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" \
         stroke-width=\"{width}\"/>"
    )
    .expect("text can be written to a string");
}

pub(super) fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, size: u32, words: &str) {
    let words = escape(words);
    writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" \
         font-size=\"{size}\">{words}</text>"
    )
    .expect("text can be written to a string");
}

/// File names may hold anything.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::tables::tests::report;
    use super::*;

    /// Every element that opens closes, in order.
    fn assert_well_formed(svg: &str) {
        let mut open = Vec::new();
        for part in svg.split('<').skip(1) {
            let (tag, after) = part.split_once('>').unwrap();
            assert!(!after.contains('>'), "a bare > in {part:?}");
            let name = tag.split_whitespace().next().unwrap();
            if let Some(name) = name.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{part:?}");
            } else if !tag.ends_with('/') {
                open.push(name);
            }
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag:?}");
        }
        assert!(open.is_empty(), "{open:?} stay open");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn every_roof_and_every_measurement_is_drawn() {
        let mut report = report();
        report.models[0].model = "a <&\"> name".to_owned();
        let svg = render(&report).unwrap();
        assert_well_formed(&svg);
        for expected in ["memory 60.0 GB/s", "int8 tdpbusd 12.00", "f32 vfmadd (512) 0.40"] {
            assert!(svg.contains(expected), "{expected} is missing in\n{svg}");
        }
        assert_eq!(svg.matches("<circle").count(), 2 + 1, "two measurements and their name");
        assert_eq!(svg.matches("<rect x").count(), 2 + 1, "two layers and their name");
    }

    #[test]
    fn places_stay_within_the_plot() {
        let axes = Axes { y: [1e10, 1e13] };
        for (intensity, ops) in [(1e-9, 1.0), (1e9, 1e20), (64.0, 1e12)] {
            assert!((PLOT[0]..=PLOT[2]).contains(&Axes::x_at(intensity)));
            assert!((PLOT[1]..=PLOT[3]).contains(&axes.y_at(ops)));
        }
    }

    #[test]
    fn without_ceilings_there_is_no_picture() {
        let mut report = report();
        report.machine.threads.clear();
        assert!(render(&report).is_none());
    }
}
