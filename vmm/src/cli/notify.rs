//! Says to systemd that a service is ready (`Type=notify`), where it is systemd that has started us.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Says that requests are answered from now on.
pub fn ready() {
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET")
        && let Err(error) = say(&socket, b"READY=1")
    {
        tracing::warn!(%error, "systemd cannot be told that we are ready");
    }
}

/// One message to the socket of this name; a leading `@` is one that is in no directory.
fn say(socket: &OsStr, words: &[u8]) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?.send_to_addr(words, &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_arrives_at_either_kind_of_socket() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("notify");
        let abstract_name = format!("ballast-test-{}", std::process::id());
        let hidden = SocketAddr::from_abstract_name(&abstract_name).unwrap();
        for (address, name) in [
            (SocketAddr::from_pathname(&path).unwrap(), path.clone().into_os_string()),
            (hidden, format!("@{abstract_name}").into()),
        ] {
            let socket = UnixDatagram::bind_addr(&address).unwrap();
            say(&name, b"READY=1").unwrap();
            let mut message = [0; 16];
            let length = socket.recv(&mut message).unwrap();
            assert_eq!(&message[..length], b"READY=1");
        }
        assert!(say(OsStr::new("/none/notify"), b"x").is_err());
    }
}
