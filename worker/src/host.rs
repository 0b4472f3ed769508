//! What the machine says about itself: which host this is, its processor, its cards.

use sha2::{Digest, Sha256};

pub use evener_kernels::cuda::probe;

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

/// The instruction set that the processor's kernels use here.
#[must_use]
pub fn instruction_set() -> &'static str {
    evener_kernels::Isa::detect().name()
}

/// Whether programs get huge pages: "always", "madvise" (those that ask, as Evener does) or "never";
/// none where the system does not say.
#[must_use]
pub fn huge_pages() -> Option<String> {
    let text = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(chosen, _)| chosen.to_owned())
}

/// Cores that this process may use, in the order in which to take them: one of each physical core
/// before its siblings.
#[must_use]
pub fn cores() -> Vec<usize> {
    let mut cores = evener_kernels::cores::allowed();
    let sibling = |core: &usize| {
        let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
        n_before(&read(&path), *core)
    };
    cores.sort_by_cached_key(sibling); // stable: else ascending
    cores
}

/// How many cores of a list such as `0-1,8` come before `core`.
fn n_before(list: &str, core: usize) -> usize {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        first.trim().parse().ok().zip(last.trim().parse().ok())
    };
    let ranges = list.split(',').filter_map(range);
    ranges.map(|(first, last): (usize, usize)| core.min(last + 1).saturating_sub(first)).sum()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_come_after_all_physical_cores() {
        assert_eq!([0, 4].map(|core| n_before("0,4", core)), [0, 1]);
        assert_eq!([2, 3].map(|core| n_before("2-3", core)), [0, 1]);
        assert_eq!([0, 1, 8, 9].map(|core| n_before("0-1,8-9", core)), [0, 1, 2, 3]);
        assert_eq!(n_before("", 7), 0);
        let (mut cores, mut allowed) = (cores(), evener_kernels::cores::allowed());
        cores.sort_unstable();
        allowed.sort_unstable();
        assert_eq!(cores, allowed);
    }

    #[test]
    fn a_host_knows_itself() {
        let id = host_id();
        assert_eq!(id, host_id());
        assert_eq!(id.len(), 32, "{id}");
        assert!(!processor().is_empty());
    }
}
