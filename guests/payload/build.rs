//! Link arguments of the payload: no C runtime, no libraries, the addresses of `guest.ld`.

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo::rerun-if-changed=guest.ld");
    // The compiled `core` names the unwinder's entry, which nothing calls in a program that aborts on panic.
    let arguments = ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--defsym=rust_eh_personality=0"];
    for argument in arguments {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,--build-id=none,-T,{directory}/guest.ld");
}
