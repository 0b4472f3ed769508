//! A non-blocking socket: the peer may be anywhere.

use super::{Fault, Link, State, Wants};
use crate::poll;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

const KEEPALIVE_IDLE_S: libc::c_int = 2;
const KEEPALIVE_INTERVAL_S: libc::c_int = 1;
const KEEPALIVE_PROBES: libc::c_int = 3;

struct Tcp {
    socket: TcpStream,
    has_hung_up: bool, // seen by poll: nobody reads what we send
}

/// `patience`: how long sent bytes may stay unacknowledged before the peer's host counts as lost.
pub(crate) fn link(socket: TcpStream, patience: Duration) -> io::Result<Box<dyn Link>> {
    socket.set_nonblocking(true)?;
    socket.set_nodelay(true)?;
    let patience_ms = patience.as_millis().clamp(1, 3_600_000) as libc::c_int;
    set(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(&socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_S)?;
    set(&socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)?;
    set(&socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
    set(&socket, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, patience_ms)?;
    Ok(Box::new(Tcp { socket, has_hung_up: false }))
}

fn set(
    socket: &TcpStream,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let bytes = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads one c_int from a live reference, as the length says.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), bytes)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What came, where "not now" is nothing.
fn now_or_never(result: io::Result<usize>) -> Result<Option<usize>, Fault> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(error) => match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(None),
            _ => Err(error.into()),
        },
    }
}

impl Link for Tcp {
    fn kind(&self) -> &'static str {
        "tcp"
    }

    fn try_send(&mut self, first: &[u8], second: &[u8]) -> Result<usize, Fault> {
        if self.has_hung_up {
            return Err(Fault::Closed);
        }
        let both = [IoSlice::new(first), IoSlice::new(second)];
        Ok(now_or_never((&self.socket).write_vectored(&both))?.unwrap_or(0))
    }

    fn try_recv(&mut self, first: &mut [u8], second: &mut [u8]) -> Result<usize, Fault> {
        let mut both = [IoSliceMut::new(first), IoSliceMut::new(second)];
        match now_or_never((&self.socket).read_vectored(&mut both))? {
            Some(0) => Err(Fault::Closed),
            Some(n) => Ok(n),
            None => Ok(0),
        }
    }

    fn arm(&mut self, _: Wants) -> bool {
        self.has_hung_up
    }

    fn disarm(&mut self) {}

    fn watch(&self, wants: Wants) -> Option<libc::pollfd> {
        let recv = if wants.recv { poll::POLLIN } else { 0 };
        let send = if wants.send { poll::POLLOUT } else { 0 };
        Some(poll::watch(self.socket.as_raw_fd(), recv | send | poll::POLLRDHUP))
    }

    fn woken(&mut self, revents: i16) {
        self.has_hung_up |= revents & (poll::POLLHUP | poll::POLLERR | poll::POLLRDHUP) != 0;
    }

    fn state(&mut self) -> State {
        let mut fd = [poll::watch(self.socket.as_raw_fd(), poll::POLLRDHUP)];
        poll::poll(&mut fd, Duration::ZERO);
        self.woken(fd[0].revents);
        let has_bytes = matches!(now_or_never(self.socket.peek(&mut [0])), Ok(Some(1..)));
        State { is_closed: self.has_hung_up, has_bytes }
    }

    fn close(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
