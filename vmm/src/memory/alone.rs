//! A worker without a controller.
//!
//! A guest that runs goes on without one, and waits for the next. One that was never started is nobody's: its worker ends itself
//! after a while.

use std::time::{Duration, Instant};

/// How long a guest that was never started waits for a controller.
const ALONE: Duration = Duration::from_secs(60);

/// Since when there is no controller, if there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alone(pub(super) Option<Instant>);

impl Alone {
    /// Time until the worker ends itself, if it does.
    pub(super) fn left(self, started: bool, now: Instant) -> Option<Duration> {
        self.0.filter(|_| !started).map(|since| ALONE.saturating_sub(now.saturating_duration_since(since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_was_never_started_is_given_up_without_a_controller() {
        let begin = Instant::now();
        let alone = Alone(Some(begin));
        assert_eq!(alone.left(false, begin), Some(ALONE));
        assert_eq!(alone.left(false, begin + ALONE / 2), Some(ALONE / 2));
        assert_eq!(alone.left(false, begin + 2 * ALONE), Some(Duration::ZERO));
        assert_eq!(alone.left(true, begin + 2 * ALONE), None);
        assert_eq!(Alone(None).left(false, begin + 2 * ALONE), None);
    }
}
