//! Whether the guests below a limit get nowhere: each has its pages taken for the others, and takes them back.
//!
//! What is evicted comes back as fast as it goes, so the limit holds, nobody is refused for long, and the policy for those
//! who are held has no reason to act. But where what guests *use* is more than there is, all of them run at the speed of
//! eviction. Then it is better to let one of them stand still than all.
//!
//! ```text
//!  pages that came back × [`COST`] ──► at least the time that the guest ran: it SUFFERS
//!                                                       │
//!         two or more suffer, for [`LASTS`] without a break ──► they THRASH
//! ```
//!
//! *Time lost* is reckoned from the pages that came back, and held against the time that the guest ran, which the kernel counts.
//! What was measured as waiting would not do: where there are more guests than CPUs most of the time goes into waiting for one
//! of those, and evicting and bringing back takes them from everybody. Twelve guests on two CPUs that had 2 % too
//! little memory did a 400th of their work, and waited for pages in 5 % of the time; lost time by this reckoning was 92 % of theirs.
//!
//! It takes two: a guest that is alone in this would gain nothing by its own end, and where another one's memory would
//! help, that one does not use it, so it goes without all this. A guest that halts, or that finds its memory, does not
//! count on either side: a group of many with two that fight thrashes.
//!
//! Linux has a like sign in the `full` line of a cgroup's `memory.pressure`, by which systemd-oomd ends cgroups. That line is
//! of moments in which *everybody* waits; from outside a guest that halts cannot be told from one that runs, so here each is
//! looked at alone.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 42 | what comes and goes is no progress: a limit at which guests only thrash does not put the policy off for ever |

use std::collections::BTreeMap;
use std::time::Duration;

use crate::progress::BRISK;
use crate::tree::{NodeId, Tree};

/// Time that a guest loses for a page that comes back, at least: the fault alone takes 60 to 85 µs where it was measured.
pub const COST: Duration = Duration::from_micros(50);

/// Guests that must suffer at the same time.
const AT_LEAST: usize = 2;

/// How long they must.
pub const LASTS: Duration = Duration::from_secs(10);

/// Whether the limit of `level` is what leaves the guest at `guest` no more: no nearer one is in the way. A host that is short
/// is in the way like a limit of the root, of all guests that are not above their own.
pub fn is_in_the_way(tree: &Tree, level: NodeId, guest: NodeId, host_is_short: bool) -> bool {
    let of_host = host_is_short && level == tree.root();
    match tree.narrowest(guest) {
        Some(at) => at == level || of_host && !tree.above_high(at),
        None => of_host,
    }
}

/// The guests below one limit. Time is since any fixed start.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    at: Duration,
    before: BTreeMap<NodeId, Seen>,
    /// Since when enough of them have suffered without a break.
    since: Option<Duration>,
}

/// A guest at the last look.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Pages that had come back to it in all.
    returned: u64,
    /// Time that it had run in all, where that was asked for.
    ran: Option<Duration>,
}

impl Watch {
    /// Looks at the guests that this limit is in the way of, each with the pages that have come back to it in all; true while they
    /// thrash. `ran` says how long a guest has run in all, if that is known, and is asked only about those to whom
    /// [`BRISK`] pages a second come back. To be called every second or so.
    pub fn step(
        &mut self,
        now: Duration,
        guests: impl IntoIterator<Item = (NodeId, u64)>,
        mut ran: impl FnMut(NodeId) -> Option<Duration>,
    ) -> bool {
        let passed = now.saturating_sub(self.at).as_micros();
        let mut suffer = 0;
        let mut look = |(id, returned): (NodeId, u64)| {
            let before = self.before.get(&id).copied();
            let pages = before.map_or(0, |before| returned.saturating_sub(before.returned));
            let is_brisk = u128::from(pages) * 1_000_000 >= u128::from(BRISK) * passed && pages > 0;
            let ran = if is_brisk { ran(id) } else { None };
            let lost = COST.saturating_mul(u32::try_from(pages).unwrap_or(u32::MAX));
            let until = before.and_then(|before| before.ran);
            suffer += usize::from(ran.zip(until).is_some_and(|(ran, until)| lost >= ran.saturating_sub(until)));
            (id, Seen { returned, ran })
        };
        let seen = guests.into_iter().map(&mut look).collect();
        let since = self.since.unwrap_or(self.at);
        self.since = (suffer >= AT_LEAST).then_some(since);
        (self.at, self.before) = (now, seen);
        self.since.is_some_and(|since| now.saturating_sub(since) >= LASTS)
    }

    /// Somebody was chosen: what comes of it is looked at anew.
    pub fn acted(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Tree;
    use crate::units::Limit;

    /// Three guests, to each of whom so many pages come back in a second, and who run for so many ms of it.
    struct Guests {
        watch: Watch,
        nodes: [NodeId; 3],
        second: u64,
        returned: [u64; 3],
        ran: [Duration; 3],
    }

    impl Guests {
        fn new() -> Self {
            let mut tree = Tree::new(Limit::Max);
            let root = tree.root();
            let nodes = ["a", "b", "c"].map(|name| tree.add(root, name).expect("added"));
            Self { watch: Watch::default(), nodes, second: 0, returned: [0; 3], ran: [Duration::ZERO; 3] }
        }

        /// So many seconds of it; whether they thrash at the end.
        fn thrash_for(&mut self, seconds: u64, each: [(u64, u64); 3]) -> bool {
            let mut thrash = false;
            for _ in 0..seconds {
                self.second += 1;
                for (guest, (pages, ms)) in each.into_iter().enumerate() {
                    self.returned[guest] += pages;
                    self.ran[guest] += Duration::from_millis(ms);
                }
                let nodes = self.nodes;
                let ran = |id| nodes.iter().position(|node| *node == id).map(|guest| self.ran[guest]);
                let guests = nodes.into_iter().zip(self.returned);
                thrash = self.watch.step(Duration::from_secs(self.second), guests, ran);
            }
            thrash
        }
    }

    /// 2000 pages cost 100 ms.
    const SUFFERS: (u64, u64) = (2000, 100);
    /// A guest that finds its memory.
    const RUNS: (u64, u64) = (0, 1000);

    /// Semantics: 42.
    #[test]
    fn two_that_lose_half_of_their_time_for_ten_seconds_thrash() {
        let mut guests = Guests::new();
        // The first look is only there to be compared with, and the second to learn how long they ran.
        assert!(!guests.thrash_for(11, [SUFFERS, SUFFERS, RUNS]));
        assert!(guests.thrash_for(1, [SUFFERS, SUFFERS, RUNS]));
        guests.watch.acted();
        assert!(!guests.thrash_for(9, [SUFFERS, SUFFERS, RUNS]), "it begins anew");
        assert!(guests.thrash_for(1, [SUFFERS, SUFFERS, RUNS]));
    }

    #[test]
    fn one_alone_does_not_nor_do_many_that_run_more_than_they_lose() {
        assert!(!Guests::new().thrash_for(60, [SUFFERS, RUNS, RUNS]));
        assert!(!Guests::new().thrash_for(60, [SUFFERS, (2000, 101), (2000, 500)]));
        assert!(!Guests::new().thrash_for(60, [SUFFERS, (255, 0), (255, 0)]), "a trickle is no thrashing");
    }

    #[test]
    fn a_second_without_it_is_a_break() {
        let mut guests = Guests::new();
        guests.thrash_for(11, [SUFFERS; 3]);
        assert!(!guests.thrash_for(1, [SUFFERS, RUNS, RUNS]));
        assert!(!guests.thrash_for(10, [SUFFERS; 3]));
    }

    #[test]
    fn who_is_new_has_lost_nothing_yet_and_one_of_whom_nothing_is_known_never() {
        let mut guests = Guests::new();
        let mut watch = Watch::default();
        guests.second = 100;
        for second in 1..30 {
            let one = guests.nodes[(second % 2) as usize];
            assert!(!watch.step(Duration::from_secs(second), [(one, 100_000 * second)], |_| Some(Duration::ZERO)));
            let all = guests.nodes.map(|id| (id, 100_000 * second));
            assert!(!guests.watch.step(Duration::from_secs(second), all, |_| None));
        }
    }
}
