//! Where sockets are: `--socket`, `$BALLAST_SOCKET`, else the user's or the system's directory.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use hyper::Method;

use super::serve::JOURNAL;
use super::{Failure, SocketArg, client};
use crate::api::server::knock;
use crate::controller::view::{VmState, VmView};

/// The directory for everybody.
const SYSTEM: &str = "/run/ballast";

/// Directories with sockets, the first is where `run` makes its own.
fn directories() -> Vec<PathBuf> {
    let user = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute());
    user.map(|dir| PathBuf::from(dir).join("ballast")).into_iter().chain([PathBuf::from(SYSTEM)]).collect()
}

fn socket_name(name: &str) -> String {
    format!("{name}.sock")
}

/// The socket of `serve` in a directory.
const SERVICE: &str = "ballast.sock";

/// Where `serve` listens.
pub fn to_serve(arg: &SocketArg) -> PathBuf {
    match &arg.socket {
        Some(path) if path.is_dir() => path.join(SERVICE),
        Some(path) => path.clone(),
        None => directories().remove(0).join(SERVICE),
    }
}

/// Where `serve` can be reached.
///
/// # Errors
/// When there is no such socket.
pub fn to_reach_service(arg: &SocketArg) -> Result<PathBuf, Failure> {
    let candidates = match &arg.socket {
        Some(path) if path.is_dir() => vec![path.join(SERVICE)],
        Some(path) => vec![path.clone()],
        None => directories().iter().map(|dir| dir.join(SERVICE)).collect(),
    };
    let found = first_of(&candidates)?;
    found.ok_or_else(|| {
        let tried = listed(&candidates);
        Failure::error(format!("there is no {tried}: start `ballast serve`, or say with --socket where it listens"))
    })
}

/// The first socket at which somebody listens, else the first that is there.
fn first_of(candidates: &[PathBuf]) -> Result<Option<PathBuf>, Failure> {
    let there: Vec<_> = candidates.iter().filter(|path| path.exists()).collect();
    let found = match there.as_slice() {
        [] => return Ok(None),
        [only] => only,
        [first, ..] => there.iter().find(|path| knock(path).is_ok()).unwrap_or(first),
    };
    check_socket(found)?;
    Ok(Some(found.to_path_buf()))
}

fn listed(candidates: &[PathBuf]) -> String {
    let tried: Vec<_> = candidates.iter().rev().map(|path| path.display().to_string()).collect();
    tried.join(" and no ")
}

/// Where `run` listens for a VM of this name.
pub fn to_listen(arg: &SocketArg, name: &str) -> PathBuf {
    match &arg.socket {
        Some(path) if path.is_dir() => path.join(socket_name(name)),
        Some(path) => path.clone(),
        None => directories().remove(0).join(socket_name(name)),
    }
}

/// The directory of a VM that is made beside its socket.
pub fn vm_directory(socket: &Path) -> PathBuf {
    socket.with_extension("d")
}

/// Where the controller of a VM of this name listens, the first that is found: for what only looks at it.
///
/// # Errors
/// When there is no such socket.
pub fn to_reach(arg: &SocketArg, name: &str) -> Result<PathBuf, Failure> {
    let candidates = match &arg.socket {
        Some(path) if path.is_dir() => in_each(std::slice::from_ref(path), name),
        Some(path) => vec![path.clone()],
        None => in_each(&directories(), name),
    };
    first_of(&candidates)?.ok_or_else(|| {
        let tried = listed(&candidates);
        Failure::error(format!(
            "no VM named {name:?} is running: there is no {}; `ballast run --name {name} …` starts one, --socket says \
             where else to look",
            tried
        ))
    })
}

/// Where the controller of the only VM of this name listens, for what changes it: two controllers may have one each. Of those
/// that have ended only `rm` and `start` take notice (`ended`).
///
/// # Errors
/// When there is no such socket, or more than one VM of this name.
pub async fn to_reach_only(arg: &SocketArg, name: &str, ended: bool) -> Result<PathBuf, Failure> {
    let places = match &arg.socket {
        Some(path) if path.is_dir() => vec![path.clone()],
        Some(_) => return to_reach(arg, name),
        None => directories(),
    };
    let mut there = in_each(&places, name);
    there.retain(|socket| socket.exists());
    if there.len() < 2 {
        return to_reach(arg, name);
    }
    let mut holders = Vec::new();
    for socket in there.into_iter().filter(|socket| knock(socket).is_ok()) {
        let asked = client::request(&socket, Method::GET, &format!("/vms/{name}"), String::new()).await;
        let Ok((_, body)) = asked else { continue };
        let view: VmView = client::decode(&body)?;
        if ended || view.state != VmState::Ended {
            holders.push(socket);
        }
    }
    match holders.len() {
        // Whoever is asked then says what is wrong.
        0 => to_reach(arg, name),
        1 => Ok(holders.remove(0)),
        _ => Err(Failure::error(format!("several VMs are named {name:?}, say which: {}", choices(&holders)))),
    }
}

/// What to type to choose one of several controllers.
fn choices(sockets: &[PathBuf]) -> String {
    let sockets: Vec<_> = sockets.iter().map(|path| format!("--socket {}", path.display())).collect();
    sockets.join(" or ")
}

/// A socket whose place somebody named is made in a directory that is there.
///
/// # Errors
/// When it is not.
pub fn check_place(arg: &SocketArg, listen: &Path) -> Result<(), String> {
    match listen.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
        Some(parent) if arg.socket.is_some() => Err(format!(
            "the socket {} cannot be made: there is no directory {}; make it, or choose another --socket",
            listen.display(),
            parent.display()
        )),
        _ => Ok(()),
    }
}

/// A VM's own socket in each directory, and after those `serve`'s: a VM may be in either.
fn in_each(directories: &[PathBuf], name: &str) -> Vec<PathBuf> {
    let own = directories.iter().map(|dir| dir.join(socket_name(name)));
    own.chain(directories.iter().map(|dir| dir.join(SERVICE))).collect()
}

/// Refuses what is no socket before anybody connects: the system would say that nobody listens there.
fn check_socket(path: &Path) -> Result<(), Failure> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => Ok(()),
        Ok(_) => Err(Failure::error(format!("{} is not a socket: give a VM's with --socket", path.display()))),
        Err(error) => {
            let path = path.display();
            Err(Failure::error(format!("there is no socket {path} ({error}): give a running VM's with --socket")))
        }
    }
}

/// The one controller that runs, for verbs without a name.
///
/// # Errors
/// When there is none, or more than one.
pub fn the_only(arg: &SocketArg) -> Result<PathBuf, Failure> {
    let mut alive = all(arg)?;
    match alive.len() {
        1 => Ok(alive.remove(0)),
        0 => Err(none_runs()),
        _ => Err(Failure::error(format!("several controllers are running, say which: {}", choices(&alive)))),
    }
}

/// There is no controller.
pub fn none_runs() -> Failure {
    Failure::error("no VM is running; `ballast run …` starts one, --socket says where else to look")
}

/// All controllers that run.
///
/// # Errors
/// When the file that was named is no socket, or none runs and one has ended whose VMs may run on.
pub fn all(arg: &SocketArg) -> Result<Vec<PathBuf>, Failure> {
    let places = match &arg.socket {
        Some(path) if path.is_dir() => vec![path.clone()],
        Some(path) => return check_socket(path).map(|()| vec![path.clone()]),
        None => directories(),
    };
    let alive: Vec<_> = places.iter().flat_map(|dir| sockets_in(dir)).collect();
    let mut services = places.iter().map(|dir| dir.join(SERVICE));
    match services.find(|path| alive.is_empty() && path.exists()) {
        Some(left) => Err(deserted(&left)),
        None => Ok(alive),
    }
}

/// That nobody listens at a socket that is there, and what is true of its VMs. Whose it was is told by what is beside it: only
/// `serve` has a journal, wherever its socket is, and `run` a directory without one. A `serve` with a --state-dir leaves nothing there.
pub fn deserted(socket: &Path) -> Failure {
    let (path, beside) = (socket.display(), vm_directory(socket));
    let serve = "its VMs run on, and `ballast serve`, started as it was, takes them over";
    let run = "its VM has ended with it; `ballast run` starts it again";
    Failure::error(if socket.ends_with(SERVICE) || beside.join(JOURNAL).exists() {
        format!("nobody listens at {path} any more: the controller has ended; {serve}")
    } else if beside.is_dir() {
        format!("nobody listens at {path} any more: the controller of this VM was killed, and {run}")
    } else {
        format!(
            "nobody listens at {path} any more: if it was that of a `ballast serve`, {serve}; if of a `ballast run`, {run}"
        )
    })
}

/// Sockets in `dir` at which somebody listens.
fn sockets_in(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .filter(|path| knock(path).is_ok())
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_completed_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let in_dir = SocketArg { socket: Some(dir.path().to_owned()) };
        assert_eq!(to_listen(&in_dir, "web"), dir.path().join("web.sock"));
        let file = SocketArg { socket: Some(dir.path().join("x")) };
        assert_eq!(to_listen(&file, "web"), dir.path().join("x"));
        assert_eq!(vm_directory(&dir.path().join("web.sock")), dir.path().join("web.d"));
    }

    #[test]
    fn a_missing_vm_is_an_error_that_says_where_it_looked() {
        let dir = tempfile::tempdir().unwrap();
        let arg = SocketArg { socket: Some(dir.path().to_owned()) };
        let failure = to_reach(&arg, "web").unwrap_err();
        assert!(failure.message.contains("web.sock"), "{failure}");
        assert!(the_only(&arg).unwrap_err().message.contains("no VM is running"));
    }

    #[test]
    fn the_only_socket_that_answers_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let arg = SocketArg { socket: Some(dir.path().to_owned()) };
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("dead.sock")).unwrap());
        let _a = std::os::unix::net::UnixListener::bind(dir.path().join("a.sock")).unwrap();
        assert_eq!(the_only(&arg).unwrap(), dir.path().join("a.sock"));
        let _b = std::os::unix::net::UnixListener::bind(dir.path().join("b.sock")).unwrap();
        let message = the_only(&arg).unwrap_err().message;
        let socket = |name: &str| format!("--socket {}", dir.path().join(name).display());
        assert!(message.ends_with(&format!("say which: {} or {}", socket("a.sock"), socket("b.sock"))), "{message}");
    }

    /// An empty list would say that there are no VMs.
    #[test]
    fn a_controller_that_has_left_vms_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let arg = SocketArg { socket: Some(dir.path().to_owned()) };
        assert_eq!(all(&arg).unwrap(), [] as [PathBuf; 0]);
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("ballast.sock")).unwrap());
        assert!(all(&arg).unwrap_err().message.contains("its VMs run on"));
        let _a = std::os::unix::net::UnixListener::bind(dir.path().join("a.sock")).unwrap();
        assert_eq!(all(&arg).unwrap(), [dir.path().join("a.sock")]);
    }

    /// Nobody is sent to remove the file of a controller whose VMs run on.
    #[test]
    fn whose_socket_it_was_is_told_by_what_is_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let said = |socket: &str| deserted(&dir.path().join(socket)).message;
        for (made, socket) in [("b.d", "b.sock"), ("ballast.d", "ballast.sock"), ("run.d", "run.sock")] {
            std::fs::create_dir(dir.path().join(made)).unwrap();
            if made != "run.d" {
                std::fs::write(dir.path().join(made).join(JOURNAL), "").unwrap();
                assert!(
                    said(socket).ends_with("its VMs run on, and `ballast serve`, started as it was, takes them over")
                );
            }
        }
        assert!(said("run.sock").ends_with("and its VM has ended with it; `ballast run` starts it again"));
        let unknown = said("elsewhere.sock");
        assert!(unknown.contains("if it was that of a `ballast serve`, its VMs run on"), "{unknown}");
        assert!(unknown.contains("if of a `ballast run`, its VM has ended"), "{unknown}");
    }

    #[test]
    fn a_vm_is_looked_for_in_its_own_controller_and_then_in_serve() {
        let dir = tempfile::tempdir().unwrap();
        let arg = SocketArg { socket: Some(dir.path().to_owned()) };
        assert_eq!(to_serve(&arg), dir.path().join("ballast.sock"));
        assert!(to_reach_service(&arg).unwrap_err().message.contains("start `ballast serve`"));
        let _serve = std::os::unix::net::UnixListener::bind(dir.path().join("ballast.sock")).unwrap();
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("web.sock")).unwrap());
        assert_eq!(to_reach(&arg, "web").unwrap(), dir.path().join("ballast.sock"), "nobody listens at the other");
        assert_eq!(to_reach_service(&arg).unwrap(), dir.path().join("ballast.sock"));
        let _own = std::os::unix::net::UnixListener::bind(dir.path().join("db.sock")).unwrap();
        assert_eq!(to_reach(&arg, "db").unwrap(), dir.path().join("db.sock"));
        assert_eq!(all(&arg).unwrap(), [dir.path().join("ballast.sock"), dir.path().join("db.sock")]);
    }
}
