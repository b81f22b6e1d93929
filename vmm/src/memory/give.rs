//! The balloon's pages: what the guest gives away, or reports as free, is claimed, discarded and uncharged before it gets
//! its buffer back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use balloon::{GuestPages, PageRange, WouldBlock};

use super::client::{Client, GivenAway, Reply, Request, Run};
use super::discard::Discarder;
use super::ram::Ram;
use memcg_core::units::PAGE_SIZE;

/// Guest memory as the balloon device uses it.
#[derive(Debug)]
pub struct BalloonPages {
    ram: Arc<Ram>,
    client: Option<Arc<Mutex<Client>>>,
    discarder: Discarder,
    runs: Vec<Run>,
    outside: Arc<AtomicU64>,
}

impl BalloonPages {
    /// The pages of `ram`. Without a client, and as long as RAM is not charged, a discard is only a discard.
    pub fn new(ram: Arc<Ram>, client: Option<Arc<Mutex<Client>>>) -> Self {
        Self { ram, client, discarder: Discarder::default(), runs: Vec::new(), outside: Arc::default() }
    }

    /// Pages that the guest named and that are not RAM, since the start.
    pub fn outside(&self) -> Arc<AtomicU64> {
        self.outside.clone()
    }

    /// Turns guest page numbers into page indices; what is not RAM is counted and left out.
    fn runs(&mut self, ranges: &[PageRange]) -> Vec<Run> {
        let mut runs = std::mem::take(&mut self.runs);
        runs.clear();
        for range in ranges {
            let (mut gpn, mut left) = (range.first, range.pages);
            while left > 0 {
                let here =
                    gpn.checked_mul(PAGE_SIZE).and_then(|gpa| self.ram.bytes_at(gpa, left.saturating_mul(PAGE_SIZE)));
                let pages = match here {
                    Some((hva, bytes)) => {
                        let pages = bytes / PAGE_SIZE;
                        runs.extend(self.ram.index_of_hva(hva).map(|first| Run { first, pages }));
                        pages
                    }
                    None => {
                        self.outside.fetch_add(1, Ordering::Relaxed);
                        1
                    }
                };
                gpn = gpn.saturating_add(pages);
                left -= pages;
            }
        }
        runs
    }

    fn ask(&self, request: Request) -> Result<Vec<Run>, WouldBlock> {
        // Between a claim and its end nothing begins to be charged: that waits for this thread to be quiet.
        let client = self.client.as_ref().filter(|_| self.ram.present().is_some());
        match (client, request) {
            (Some(client), request) => match client.lock().unwrap_or_else(PoisonError::into_inner).ask(request) {
                Reply::Done(runs) => Ok(runs),
                Reply::WouldBlock | Reply::Job(..) => Err(WouldBlock),
            },
            (None, Request::Claim(runs, _) | Request::Discarded(runs, _) | Request::Deflated(runs)) => Ok(runs),
            (None, _) => Ok(Vec::new()),
        }
    }

    /// Discards what is present of `ranges`.
    fn give(&mut self, ranges: &[PageRange], to: GivenAway) -> Result<(), WouldBlock> {
        let runs = self.runs(ranges);
        let runs = self.ask(Request::Claim(runs, to))?;
        if let Err(e) = self.discarder.discard(&self.ram, &runs) {
            // Claimed pages of unknown content: neither charging nor uncharging them would be true.
            crate::worker::complain(format_args!("the host refuses to discard guest memory: {e}"));
            std::process::abort();
        }
        self.runs = self.ask(Request::Discarded(runs, to))?;
        Ok(())
    }
}

impl GuestPages for BalloonPages {
    fn inflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.give(ranges, GivenAway::Balloon)
    }

    fn report(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.give(ranges, GivenAway::Report)
    }

    fn deflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        let runs = self.runs(ranges);
        self.runs = self.ask(Request::Deflated(runs))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_numbers_outside_ram_are_counted_and_left_out() {
        let ram = Arc::new(Ram::map(&[(0, 1 << 20), (4 << 30, 1 << 20)]).unwrap());
        let mut pages = BalloonPages::new(ram, None);
        let ranges = [
            PageRange { first: 254, pages: 4 },
            PageRange { first: (4 << 30) / PAGE_SIZE + 255, pages: 2 },
            PageRange { first: u64::MAX - 1, pages: 2 },
        ];
        assert_eq!(pages.runs(&ranges), [Run { first: 254, pages: 2 }, Run { first: 511, pages: 1 }]);
        assert_eq!(pages.outside().load(Ordering::Relaxed), 5);
    }
}
