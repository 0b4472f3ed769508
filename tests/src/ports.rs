//! Ports for processes that cannot be told to take any and say which.

use std::net::SocketAddr;

use tokio::net::TcpSocket;

/// A free port of this machine. While this lives the system gives it to no one who asks for any,
/// and one process may listen on it: the socket here is bound and never listens.
pub struct Reserved {
    _socket: TcpSocket,
    address: SocketAddr,
}

impl Reserved {
    /// # Panics
    /// There is none.
    #[must_use]
    #[allow(clippy::new_without_default)] // each is another
    pub fn new() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        // With it the process that listens may bind the same address, as all of ours and etcd do.
        socket.set_reuseaddr(true).expect("an option of every socket");
        socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let address = socket.local_addr().expect("a bound socket has an address");
        Self { _socket: socket, address }
    }

    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}
