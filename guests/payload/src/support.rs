//! The functions that compiled code calls by name and that a C library would bring.

use core::arch::asm;

/// # Safety
/// As C's: both ranges are valid for `count` bytes and do not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise is what the instruction needs; the direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") count => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's: both ranges are valid for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: the target does not begin inside the source, so copying upwards reads each byte before it is written.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: copies downwards from the last bytes, for the same reason; `count` is not zero here, and the direction
    // flag is cleared again before any other code runs.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rdi") to.add(count - 1) => _, inout("rsi") from.add(count - 1) => _,
            inout("rcx") count => _, options(nostack));
    }
    to
}

/// # Safety
/// As C's: the range is valid for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller's promise is what the instruction needs; the direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rdi") to => _, in("al") value as u8, inout("rcx") count => _,
            options(nostack, preserves_flags));
    }
    to
}

/// # Safety
/// As C's: both ranges are valid for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    for i in 0..count {
        // SAFETY: `i` is below `count`; volatile, so that the loop does not become a call to this function.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// # Safety
/// As C's: both ranges are valid for `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the same promise.
    unsafe { memcmp(a, b, count) }
}

/// # Safety
/// As C's: the text ends with a NUL.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut length = 0;
    // SAFETY: every byte up to the NUL is valid; volatile, so that the loop does not become a call to this function.
    while unsafe { text.add(length).read_volatile() } != 0 {
        length += 1;
    }
    length
}
