//! What the machine says about itself: which host this is, its processor.

use sha2::{Digest, Sha256};

/// Equal for two processes that run on one host since its last start, and may so share memory;
/// empty where the system does not say, which is taken as sharing with nobody.
#[must_use]
pub fn host_id() -> String {
    let boot = read("/proc/sys/kernel/random/boot_id");
    if boot.is_empty() {
        return boot;
    }
    let mut hash = Sha256::new();
    hash.update(boot);
    hash.update(read("/etc/machine-id"));
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// The processor, as the machine calls it.
#[must_use]
pub fn processor() -> String {
    let text = read("/proc/cpuinfo");
    let name = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = name.and_then(|rest| rest.split_once(':')).map(|(_, name)| name.trim().to_owned());
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_knows_itself() {
        let id = host_id();
        assert_eq!(id, host_id());
        assert_eq!(id.len(), 32, "{id}");
        assert!(!processor().is_empty());
    }
}
