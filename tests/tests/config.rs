//! `--config FILE.toml`: a VM in a file, for `create` and for `run`.

use std::path::Path;

use ballast_tests::serve::{Serve, program};
use ballast_tests::{payload, skipped};
use serde_json::json;

/// A file with this text, beside a link to the payload.
fn file(place: &Path, text: &str) -> String {
    let kernel = place.join("payload.bin");
    if !kernel.exists() {
        std::os::unix::fs::symlink(payload(), kernel).expect("a link");
    }
    let path = place.join("web.toml");
    std::fs::write(&path, text).expect("a file");
    path.to_str().expect("a path that is text").to_owned()
}

const WEB: &str = "\
name = \"web\"
kernel = \"payload.bin\"
cmdline = \"shell\"
debug_port = true

[memory]
size = \"64M\"
max = \"48M\"
";

#[test]
fn a_vm_in_a_file_is_made_and_options_take_the_place_of_its_words() {
    if skipped("config-create") {
        return;
    }
    let place = tempfile::tempdir().expect("a temporary directory");
    let file = file(place.path(), WEB);
    let serve = Serve::start(&[]);
    for words in [&["create", "--config", &file][..], &["create", "web", "--config", &file]] {
        let made = serve.verb(words);
        assert_eq!(made.status.code(), Some(0), "{}", String::from_utf8_lossy(&made.stderr));
        let web = serve.show("web");
        assert_eq!((&web["cpus"], &web["memory"]["max_bytes"]), (&json!(1), &json!(48 << 20)));
    }
    let made = serve.verb(&["create", "other", "--config", &file, "--cpus", "2", "--memory", "size=32M,max=24M"]);
    assert_eq!(made.status.code(), Some(0), "{}", String::from_utf8_lossy(&made.stderr));
    let other = serve.show("other");
    assert_eq!((&other["cpus"], &other["memory"]["max_bytes"]), (&json!(2), &json!(24 << 20)));
    assert_eq!(serve.names(), ["other", "web"]);
}

/// One file is for `create` and for `run`, which has no groups.
#[test]
fn run_takes_no_notice_of_the_group_in_a_file() {
    if skipped("config-run") {
        return;
    }
    let place = tempfile::tempdir().expect("a temporary directory");
    let file = file(place.path(), &format!("group = \"/gold\"\n{WEB}"));
    let ran = program(&["run", "--config", &file, "--cmdline", "exit 7"], place.path()).output().expect("it runs");
    assert_eq!(ran.status.code(), Some(7), "{}", String::from_utf8_lossy(&ran.stderr));
}

#[test]
fn a_file_that_makes_no_sense_is_a_usage_error_with_its_line() {
    let place = tempfile::tempdir().expect("a temporary directory");
    for (text, part) in [
        (WEB.replace("48M", "48%"), "web.toml:8: max: \"48%\" is a percentage"),
        (WEB.replace("debug_port", "debug-port"), "web.toml:4: unknown field `debug-port`"),
        (WEB.replace("kernel = \"payload.bin\"\n", ""), "there is no kernel in "),
    ] {
        let file = file(place.path(), &text);
        for verb in ["run", "create"] {
            let said = program(&[verb, "--config", &file], place.path()).output().expect("it runs");
            let err = String::from_utf8_lossy(&said.stderr);
            assert_eq!((said.status.code(), err.lines().count()), (Some(2), 1), "{verb}: {err}");
            assert!(err.starts_with("ballast: ") && err.contains(part), "{verb}: {err}");
        }
    }
    let said = program(&["run", "--config", "/none.toml"], place.path()).output().expect("it runs");
    assert_eq!(said.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&said.stderr).contains("/none.toml cannot be read"), "{said:?}");
    let named = file(place.path(), &WEB.replace("name = \"web\"\n", ""));
    let said = program(&["create", "--config", &named], place.path()).output().expect("it runs");
    assert!(String::from_utf8_lossy(&said.stderr).contains("gives the VM no name"), "{said:?}");
}
