//! The power button: an input device, whose only key turns the machine off.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use crate::sys;

/// Bytes of an event: seconds and microseconds, type, code, value (`struct input_event`).
const EVENT: usize = 24;
/// Type, code and value of the key that goes down (`EV_KEY`, `KEY_POWER`).
const PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0];

/// Turns the machine off when a power button is pressed. Without one nothing happens.
pub fn watch() {
    let Some(device) = find() else { return };
    std::thread::spawn(move || {
        let Ok(mut device) = File::open(device) else { return };
        let mut event = [0; EVENT];
        while device.read_exact(&mut event).is_ok() {
            if event[16..] == PRESSED {
                sys::power_off();
            }
        }
    });
}

/// The first input device that calls itself a power button.
fn find() -> Option<PathBuf> {
    let inputs = fs::read_dir("/sys/class/input").ok()?.flatten();
    let button = inputs.filter(|entry| entry.file_name().to_string_lossy().starts_with("event")).find(|entry| {
        fs::read_to_string(entry.path().join("device/name")).is_ok_and(|name| name.trim() == "Power Button")
    })?;
    Some(PathBuf::from("/dev/input").join(button.file_name()))
}
