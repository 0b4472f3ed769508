//! What a request has to keep to count as good: `ttft=500ms,itl=100ms`.

use std::str::FromStr;

use anyhow::{Context, bail};

use super::statistics::Served;

/// Limits in seconds; a figure without one is not judged.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Slo {
    ttft: Option<f64>,
    /// Of the longest gap of a request.
    itl: Option<f64>,
    tpot: Option<f64>,
    e2e: Option<f64>,
}

impl Slo {
    pub fn is_met_by(&self, served: &Served) -> bool {
        let within = |figure: Option<f64>, limit: Option<f64>| match (figure, limit) {
            (Some(figure), Some(limit)) => figure <= limit,
            _ => true,
        };
        let longest = served.gaps.iter().copied().reduce(f64::max);
        within(Some(served.ttft), self.ttft)
            && within(longest, self.itl)
            && within(served.tpot(), self.tpot)
            && within(Some(served.e2e), self.e2e)
    }
}

impl FromStr for Slo {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut slo = Self::default();
        for part in text.split(',') {
            let (name, limit) = part.split_once('=').with_context(|| {
                format!("{part:?} is no limit; write one as ttft=500ms or itl=0.1s")
            })?;
            let limit = seconds(limit)?;
            let place = match name.trim() {
                "ttft" => &mut slo.ttft,
                "itl" => &mut slo.itl,
                "tpot" => &mut slo.tpot,
                "e2e" => &mut slo.e2e,
                other => bail!("{other:?} cannot be limited; ttft, itl, tpot and e2e can"),
            };
            if place.replace(limit).is_some() {
                bail!("{name} is limited twice");
            }
        }
        Ok(slo)
    }
}

/// `500ms`, `1.5s`, `2m`: more than nothing.
pub fn seconds(text: &str) -> anyhow::Result<f64> {
    let text = text.trim();
    let (number, unit) = match text {
        _ if text.ends_with("ms") => (text.trim_end_matches("ms"), 1e-3),
        _ if text.ends_with('s') => (text.trim_end_matches('s'), 1.0),
        _ if text.ends_with('m') => (text.trim_end_matches('m'), 60.0),
        _ => bail!("{text:?} has no unit: ms, s or m"),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number > 0.0 => Ok(number * unit),
        _ => bail!("{text:?} is no time; write one as 500ms, 1.5s or 2m"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_or_refused_with_a_reason() {
        let slo: Slo = "ttft=500ms,itl=0.1s".parse().unwrap();
        assert_eq!(slo, Slo { ttft: Some(0.5), itl: Some(0.1), ..Slo::default() });
        for (text, expected) in [
            ("ttft", "ttft=500ms"),
            ("ttft=5", "no unit"),
            ("ttft=-1s", "no time"),
            ("speed=1s", "cannot be limited"),
            ("itl=1s,itl=2s", "twice"),
        ] {
            let error = text.parse::<Slo>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_request_is_good_if_it_keeps_every_limit() {
        let served = Served { ttft: 0.4, gaps: vec![0.1, 0.3], e2e: 0.8, n_prompt: 5, n_output: 3 };
        for (slo, good) in [
            ("ttft=400ms", true),
            ("ttft=399ms", false),
            ("itl=300ms", true),
            ("itl=299ms", false),
            ("tpot=201ms", true),
            ("tpot=199ms", false),
            ("e2e=800ms,ttft=1s", true),
            ("e2e=799ms,ttft=1s", false),
        ] {
            assert_eq!(slo.parse::<Slo>().unwrap().is_met_by(&served), good, "{slo}");
        }
    }
}
