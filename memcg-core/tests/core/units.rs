//! Sizes, pages, limits.

use memcg_core::units::{Limit, Pages, SizeArg, SizeError, exact, human, parse_size};
use proptest::prelude::*;

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const T: u64 = 1 << 40;

/// What is a size: as people and `echo` write it.
/// Semantics: 6, T6, B3.
#[test]
fn sizes_that_are_read() {
    let table = [
        ("0", 0),
        ("0K", 0),
        ("1", 1),
        ("4096", 4096),
        ("100B", 100),
        ("4K", 4 * K),
        ("4k", 4 * K),
        ("4Ki", 4 * K),
        ("4KB", 4 * K),
        ("4KiB", 4 * K),
        ("4kib", 4 * K),
        ("256M", 256 * M),
        ("256MiB", 256 * M),
        ("1G", G),
        ("1.5G", 3 * G / 2),
        ("0.5K", 512),
        ("1.50M", 3 * M / 2),
        ("2.000000000000000000000000000000M", 2 * M),
        ("2T", 2 * T),
        ("16777215T", 16_777_215 * T),
        ("18446744073709551615", u64::MAX),
        (" 128M ", 128 * M),
        ("128M\n", 128 * M),
        ("007", 7),
    ];
    for (text, bytes) in table {
        assert_eq!(parse_size(text), Ok(SizeArg::Bytes(bytes)), "{text:?}");
    }
    assert_eq!(parse_size("max"), Ok(SizeArg::Max));
    assert_eq!(parse_size(" max\n"), Ok(SizeArg::Max));
}

/// What is none. Nothing is taken for zero, for "no limit" or for a share by accident, and nothing wraps.
/// Semantics: 6, 103, B3.
#[test]
fn sizes_that_are_refused() {
    type Is = fn(&SizeError) -> bool;
    let empty: Is = |e| matches!(e, SizeError::Empty);
    let negative: Is = |e| matches!(e, SizeError::Negative(_));
    let percent: Is = |e| matches!(e, SizeError::Percent(_));
    let malformed: Is = |e| matches!(e, SizeError::Malformed(_));
    let large: Is = |e| matches!(e, SizeError::TooLarge(_));
    let fraction: Is = |e| matches!(e, SizeError::Fraction(_));
    let table: &[(&str, Is)] = &[
        ("", empty),
        ("  \n", empty),
        ("-1", negative),
        ("-1M", negative),
        ("-", negative),
        ("50%", percent),
        ("%", percent),
        ("MAX", malformed),
        ("maximum", malformed),
        ("M", malformed),
        (".", malformed),
        (".5G", malformed),
        ("1.", malformed),
        ("1.G", malformed),
        ("1.2.3M", malformed),
        ("1 G", malformed),
        ("1G 2", malformed),
        ("1GG", malformed),
        ("1Gi B", malformed),
        ("1iB", malformed),
        ("1BK", malformed),
        ("1P", malformed),
        ("+1", malformed),
        ("0x10", malformed),
        ("1e9", malformed),
        ("1_000", malformed),
        ("1,5G", malformed),
        ("٣M", malformed),
        ("unlimited", malformed),
        ("18446744073709551616", large),
        ("16777216T", large),
        ("99999999999999999999999999G", large),
        ("18446744073709551615K", large),
        ("1.5", fraction),
        ("1.3G", fraction),
        ("0.1K", fraction),
        ("0.000000000001T", fraction),
        ("1.00000000000000000000000000001G", fraction),
    ];
    for (text, is) in table {
        let error = parse_size(text).expect_err(text);
        assert!(is(&error), "{text:?} gave {error:?}");
        let message = error.to_string();
        assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
    }
}

/// Bytes outside, whole pages inside; what is between is refused, not rounded behind the user's back.
/// Semantics: 6, 2.
#[test]
fn a_limit_is_whole_pages() {
    assert_eq!(SizeArg::Bytes(0).to_limit(), Ok(Limit::ZERO));
    assert_eq!(SizeArg::Bytes(8192).to_limit(), Ok(Limit::Pages(Pages(2))));
    assert_eq!(SizeArg::Max.to_limit(), Ok(Limit::Max));
    assert_eq!(SizeArg::Bytes(5000).to_limit(), Err(SizeError::NotPages { bytes: 5000, below: 4096 }));
    assert_eq!(SizeArg::Max.to_pages(), Err(SizeError::MaxNotAllowed));
    assert_eq!(SizeArg::Bytes(4096).to_pages(), Ok(Pages(1)));
}

/// What people are shown can be compared with what they wrote.
/// Semantics: T6.
#[test]
fn sizes_for_people() {
    let table = [
        (0, "0"),
        (1, "1"),
        (1023, "1023"),
        (1024, "1K"),
        (4096, "4K"),
        (1536, "1.5K"),
        (192 * M, "192M"),
        (192 * M + 4096, "192.0M"),
        (3 * G / 2, "1.5G"),
        (G - 1, "1.0G"),
        (G - 4096, "1.0G"),
        (1023 * M, "1023M"),
        (5 * T / 2, "2.5T"),
        (2048 * T, "2048T"),
        (u64::MAX, "16777216.0T"),
    ];
    for (bytes, text) in table {
        assert_eq!(human(bytes), text, "{bytes}");
    }
}

/// Arithmetic of pages never wraps: a limit that overflows would be none.
/// Semantics: 6, B1, B3.
#[test]
fn pages_and_bytes() {
    assert_eq!(Pages::from_bytes_floor(8191), Pages(1));
    assert_eq!(Pages::from_bytes_ceil(8191), Pages(2));
    assert_eq!(Pages::from_bytes_ceil(8192), Pages(2));
    assert_eq!(Pages::from_bytes_ceil(u64::MAX), Pages(1 << 52));
    assert_eq!(Pages(u64::MAX).bytes(), u64::MAX);
    assert_eq!(Pages(3).bytes(), 12288);
    assert_eq!(Pages(u64::MAX) + Pages(1), Pages(u64::MAX));
    assert_eq!(Pages(u64::MAX).checked_add(Pages(1)), None);
    assert_eq!(Pages(1).saturating_sub(Pages(2)), Pages::ZERO);
    assert_eq!([Pages(1), Pages(2)].into_iter().sum::<Pages>(), Pages(3));
    assert_eq!((Pages(1).to_string(), Pages(2).to_string()), ("1 page".to_owned(), "2 pages".to_owned()));
}

/// "No limit" is a value of its own, above every number, and no accident of arithmetic.
/// Semantics: 2, 103.
#[test]
fn max_is_above_every_number() {
    assert!(Limit::Max > Limit::Pages(Pages(u64::MAX)));
    assert!(Limit::Pages(Pages(2)) > Limit::Pages(Pages(1)));
    assert_eq!(Limit::Max.min(Limit::Pages(Pages(7))), Limit::Pages(Pages(7)));
    assert_eq!((Limit::Max.as_pages(), Limit::Max.as_bytes()), (None, None));
    assert_eq!(Limit::default(), Limit::Max);
    assert_eq!(format!("{} {}", Limit::Max, Limit::Pages(Pages(49152))), "max 192M");
}

proptest! {
    /// Whole numbers in any unit are exact.
    /// Semantics: 6, T6.
    #[test]
    fn whole_sizes_are_exact(n in 0u64..(1 << 24), unit in 0usize..4) {
        let suffix = ["K", "M", "G", "T"][unit];
        let shift = 10 * (unit + 1);
        prop_assert_eq!(parse_size(&format!("{n}{suffix}")), Ok(SizeArg::Bytes(n << shift)));
    }

    /// Nothing that a user may type stops the program.
    /// Semantics: 6.
    #[test]
    fn any_text_is_answered(text in "\\PC{0,40}") {
        let _ = parse_size(&text);
    }

    /// Nor what looks like a number, of any length.
    /// Semantics: 6, B3.
    #[test]
    fn any_number_like_text_is_answered(text in "[0-9]{0,30}\\.?[0-9]{0,40}[KMGTkmgtiB]{0,3}") {
        let _ = parse_size(&text);
    }

    /// What people are shown is within half a tenth of its unit, and what has no decimals is exact and can be typed back.
    /// Semantics: 8, T6.
    #[test]
    fn human_is_close(mantissa in any::<u64>(), shift in 0u32..64) {
        let bytes = mantissa >> shift;
        let text = human(bytes);
        match text.split_once('.') {
            None => prop_assert_eq!(parse_size(&text), Ok(SizeArg::Bytes(bytes))),
            Some((whole, tenth)) => {
                let (tenth, suffix) = tenth.split_at(1);
                let unit = K.pow(1 + "KMGT".find(suffix).unwrap() as u32);
                let tenths = whole.parse::<u128>().unwrap() * 10 + tenth.parse::<u128>().unwrap();
                prop_assert!(whole.parse::<u64>().unwrap() < 1024 || suffix == "T");
                let shown = tenths * u128::from(unit);
                prop_assert!(shown.abs_diff(u128::from(bytes) * 10) <= u128::from(unit) / 2, "{}", text);
            }
        }
        prop_assert_eq!(parse_size(&exact(bytes)), Ok(SizeArg::Bytes(bytes)));
        prop_assert_eq!(parse_size(&exact(bytes << 20)), Ok(SizeArg::Bytes(bytes << 20)));
    }
}
