//! Which cores this process may use, and pinning a thread to one. What is asked of the system is
//! two calls; who gets which core is decided elsewhere.

use std::io;

/// Cores that the calling thread may run on, ascending; empty where the system does not say.
#[must_use]
pub fn allowed() -> Vec<usize> {
    let mut set = empty();
    // SAFETY: the kernel writes at most the given size into one live cpu_set_t; 0 is this thread.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
    if result != 0 {
        return Vec::new();
    }
    (0..libc::CPU_SETSIZE as usize).filter(|&core| is_set(core, &set)).collect()
}

/// Keeps the calling thread, and threads it starts from now on, on these cores.
///
/// # Errors
/// None of them is a core that the process may use.
pub fn pin(cores: &[usize]) -> io::Result<()> {
    let mut set = empty();
    for &core in cores {
        if core >= libc::CPU_SETSIZE as usize {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        // SAFETY: the core is within the set.
        unsafe { libc::CPU_SET(core, &mut set) };
    }
    // SAFETY: the kernel reads one live cpu_set_t; 0 is this thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn empty() -> libc::cpu_set_t {
    // SAFETY: a cpu_set_t is plain words, and all of them zero is the empty set.
    unsafe { std::mem::zeroed() }
}

fn is_set(core: usize, set: &libc::cpu_set_t) -> bool {
    // SAFETY: callers ask for cores below CPU_SETSIZE only.
    unsafe { libc::CPU_ISSET(core, set) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_stays_where_it_was_put_and_others_do_not() {
        let before = allowed();
        assert!(!before.is_empty());
        let core = *before.last().unwrap();
        let inside = std::thread::spawn(move || {
            pin(&[core]).unwrap();
            allowed()
        });
        assert_eq!(inside.join().unwrap(), [core]);
        assert_eq!(allowed(), before);
    }

    #[test]
    fn cores_that_are_not_there_are_refused() {
        assert!(pin(&[1 << 20]).is_err());
        assert!(pin(&[]).is_err());
    }
}
