//! The `ballast` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A worker is this program again. It must not have the controller's runtime, nor any other thread, yet.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "worker") {
        ballast::worker::main()
    }
    ballast::cli::main()
}
