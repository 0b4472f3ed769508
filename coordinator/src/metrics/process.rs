//! What this process takes of the machine; nothing where the system does not say.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

/// Linux tells processor time in hundredths of a second, whatever its own clock does (proc(5)).
const TICKS_PER_S: f64 = 100.0;

#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let Some(seconds) = cpu_s(&stat) else { return Ok(()) };
        let help = "Processor time of this coordinator.";
        let (name, unit) = ("coordinator_cpu", Unit::Seconds);
        let mut family = encoder.encode_descriptor(name, help, Some(&unit), MetricType::Counter)?;
        family.encode_counter::<[(&str, &str); 0], f64, f64>(&seconds, None)
    }
}

/// Of the whole process, user and system, from the text of `/proc/PID/stat`.
fn cpu_s(stat: &str) -> Option<f64> {
    // The second field is the name in parentheses, and may hold any character.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some((ticks()? + ticks()?) as f64 / TICKS_PER_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_and_system_time_are_found_behind_any_name() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 3 4 20 0 3 0 99 1 1";
        assert_eq!(cpu_s(stat), Some(3.0));
        assert_eq!(cpu_s(""), None);
        assert_eq!(cpu_s("7 (a) S 1"), None);
    }
}
