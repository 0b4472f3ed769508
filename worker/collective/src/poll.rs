//! Sleeping until one of some file descriptors is ready: a safe face on poll(2).

use std::os::fd::RawFd;
use std::time::Duration;

pub(crate) use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT, POLLRDHUP, pollfd};

pub(crate) fn watch(fd: RawFd, events: i16) -> pollfd {
    pollfd { fd, events, revents: 0 }
}

/// Waits until one is ready or `timeout` has passed. A signal or an error counts as nothing ready:
/// callers look at the state they wait for in any case.
pub(crate) fn poll(fds: &mut [pollfd], timeout: Duration) {
    let ms = timeout.as_micros().div_ceil(1000).min(60_000) as libc::c_int;
    // SAFETY: the pointer and the count describe one exclusively borrowed slice.
    let n_ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) };
    if n_ready < 0 {
        fds.iter_mut().for_each(|fd| fd.revents = 0);
    }
}
