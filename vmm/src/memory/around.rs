//! Fault-around: how many pages one fault fills.
//!
//! A fault costs about a hundred times what filling one more page costs, so a guest that walks through memory gets
//! several pages a fault. A guest that jumps about gets exactly what it touches: every page filled is charged.
//!
//! A few *streams* are remembered. A fault that continues one doubles its granule up to [`MAX_GRANULE`]; any other
//! fault starts a stream with a granule of one page in the place of the one unused for longest. So a stream never fills
//! more pages ahead than have been touched in it before.

/// Largest granule in pages (8 MiB, half of a full stock) for a guest with one vCPU that has walked through as much
/// already. Vcpus share it: while one window is filled, the faults of the others wait.
pub const MAX_GRANULE: u64 = 2048;

/// Streams remembered; more than vCPUs are likely to walk at the same time in a small guest.
const STREAMS: usize = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The page at which a fault would continue upwards.
    above: u64,
    /// The page at which a fault would continue downwards, plus one (0: none).
    below: u64,
    granule: u64,
    used: u64,
}

/// The pages that a fault should fill: `first..first + pages`, the touched page among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First page.
    pub first: u64,
    /// Number of pages, 1 to [`MAX_GRANULE`].
    pub pages: u64,
}

impl Window {
    /// The same with at most `most` pages, and at least the page `touched`, which is its first or its last.
    pub fn cut(self, touched: u64, most: u64) -> Self {
        let pages = self.pages.min(most).max(1);
        let first = if touched == self.first { touched } else { touched + 1 - pages };
        Self { first, pages }
    }
}

/// The streams of one VM.
#[derive(Debug)]
pub struct Around {
    streams: [Stream; STREAMS],
    clock: u64,
    max: u64,
}

impl Around {
    /// No stream yet, for a guest with `cpus` vCPUs (at least 1).
    pub fn new(cpus: u32) -> Self {
        Self { streams: Default::default(), clock: 0, max: (MAX_GRANULE / u64::from(cpus.max(1))).max(16) }
    }

    /// The window for a fault at `page` when the run of fillable pages around it is `run`, and its stream's number
    /// for [`Around::filled`].
    ///
    /// `run` contains `page`. The window has at most `most` pages, and at least one.
    pub fn window(&mut self, page: u64, run: std::ops::Range<u64>, most: u64) -> (Window, usize) {
        self.clock += 1;
        let found = self.streams.iter().position(|s| s.granule > 0 && (s.above == page || s.below == page + 1));
        let slot = found.unwrap_or_else(|| {
            let oldest = self.streams.iter().enumerate().min_by_key(|(_, s)| s.used).map_or(0, |(i, _)| i);
            self.streams[oldest] = Stream::default();
            oldest
        });
        let stream = &mut self.streams[slot];
        stream.used = self.clock;
        let downwards = found.is_some() && stream.above != page;
        stream.granule = if found.is_some() { (stream.granule * 2).min(self.max) } else { 1 };
        let pages = stream.granule.min(most).max(1);
        let window = if downwards {
            let first = (page + 1).saturating_sub(pages).max(run.start);
            Window { first, pages: page + 1 - first }
        } else {
            Window { first: page, pages: pages.min(run.end - page) }
        };
        (window, slot)
    }

    /// Says what was filled for the fault that [`Around::window`] gave `slot` for.
    pub fn filled(&mut self, slot: usize, window: Window) {
        let stream = &mut self.streams[slot];
        stream.above = window.first + window.pages;
        stream.below = window.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(around: &mut Around, page: u64) -> Window {
        let (window, slot) = around.window(page, 0..1 << 20, MAX_GRANULE);
        around.filled(slot, window);
        window
    }

    #[test]
    fn a_sequential_walk_doubles_up_to_what_a_stock_holds() {
        let mut around = Around::new(1);
        let mut page = 1000;
        let sizes: Vec<u64> = (0..13)
            .map(|_| {
                let w = touch(&mut around, page);
                page = w.first + w.pages;
                w.pages
            })
            .collect();
        assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 2048]);
    }

    #[test]
    fn vcpus_share_the_largest_granule() {
        let mut around = Around::new(4);
        let mut page = 0;
        for _ in 0..15 {
            let w = touch(&mut around, page);
            assert!(w.pages <= MAX_GRANULE / 4);
            page = w.first + w.pages;
        }
    }

    #[test]
    fn a_walk_downwards_is_followed_too() {
        let mut around = Around::new(1);
        touch(&mut around, 1000);
        assert_eq!(touch(&mut around, 999), Window { first: 998, pages: 2 });
        assert_eq!(touch(&mut around, 997), Window { first: 994, pages: 4 });
    }

    #[test]
    fn random_touches_get_one_page_each() {
        let mut around = Around::new(1);
        for i in 0..100 {
            assert_eq!(touch(&mut around, i * 7919 % 100_000).pages, 1);
        }
    }

    #[test]
    fn interleaved_walks_keep_their_own_granules() {
        let mut around = Around::new(1);
        let (mut a, mut b) = (0, 500_000);
        for _ in 0..5 {
            a = {
                let w = touch(&mut around, a);
                w.first + w.pages
            };
            b = {
                let w = touch(&mut around, b);
                w.first + w.pages
            };
        }
        assert_eq!((a, b), (31, 500_031));
    }

    #[test]
    fn a_window_has_no_more_than_it_may_and_a_walk_goes_on_behind_it() {
        let mut around = Around::new(1);
        let mut walk = |page: u64, most: u64| {
            let (window, slot) = around.window(page, 0..1 << 20, most);
            around.filled(slot, window);
            assert_eq!(window.first, page);
            window.pages
        };
        assert_eq!([walk(0, 0), walk(1, 1), walk(2, 3), walk(5, 5), walk(10, 100)], [1, 1, 3, 5, 16]);
        let mut around = Around::new(1);
        touch(&mut around, 1000);
        assert_eq!(around.window(999, 0..1 << 20, 1).0, Window { first: 999, pages: 1 });
    }

    #[test]
    fn the_window_stays_inside_the_run() {
        let mut around = Around::new(1);
        for (page, run) in [(10, 10..11), (11, 11..12), (12, 12..14)] {
            let (w, slot) = around.window(page, run.clone(), MAX_GRANULE);
            around.filled(slot, w);
            assert!(
                w.first >= run.start && w.first + w.pages <= run.end && (w.first..w.first + w.pages).contains(&page)
            );
        }
    }
}
