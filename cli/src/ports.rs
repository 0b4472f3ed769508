//! Ports that nobody else can take between our choosing them and a child's listening on them.

use std::net::SocketAddr;

use anyhow::anyhow;
use tokio::net::TcpSocket;

/// An address bound but not listened on: the kernel gives it to no one who asks for a free port,
/// yet a child may listen on it, because both sockets allow reuse and only one listens.
#[derive(Debug)]
pub struct Reserved {
    _socket: TcpSocket,
    pub address: SocketAddr,
}

/// Reserves `wanted`; port 0 means any free one.
///
/// # Errors
/// Somebody listens there, or the address is not one of this machine.
pub fn reserve(wanted: SocketAddr) -> anyhow::Result<Reserved> {
    let bind = || {
        let socket = if wanted.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(wanted)?;
        let address = socket.local_addr()?;
        Ok(Reserved { _socket: socket, address })
    };
    bind().map_err(|error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AddrInUse => anyhow!(
            "cannot listen on {wanted}: another process does already; stop it, or choose another \
             port with --listen (port 0 takes any free one)"
        ),
        std::io::ErrorKind::AddrNotAvailable => anyhow!(
            "cannot listen on {wanted}: this machine does not have that address; 127.0.0.1 and \
             0.0.0.0 always work"
        ),
        std::io::ErrorKind::PermissionDenied => anyhow!(
            "cannot listen on {wanted}: ports below 1024 need privileges; choose another with \
             --listen"
        ),
        _ => anyhow!("cannot listen on {wanted}: {error}"),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn any() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 0))
    }

    #[tokio::test]
    async fn a_reserved_port_can_be_listened_on_by_its_owner_only_once() {
        let reserved = reserve(any()).unwrap();
        let listener = tokio::net::TcpListener::bind(reserved.address).await.unwrap();
        let error = reserve(listener.local_addr().unwrap()).unwrap_err().to_string();
        assert!(error.contains("another process does already"), "{error}");
    }
}
