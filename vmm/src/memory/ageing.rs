//! Ageing: what a guest uses, found out while nobody needs its memory.
//!
//! Time is cut into periods, which are the generations of the frame table. At the begin of each, a sample of the pages
//! that are kept is put aside ([`Sampler`]): which of them come back within two periods says how much memory is in use. Over the
//! rest of the period, the coldest pages are put aside in steps, those first whose neighbours in the sample of the last
//! period have not come back: what comes back has proved to be in use, what stays has an age. The [`Governor`] says how
//! many of both there may be.
//!
//! ```text
//!  period n ≥ 1                                                                n + 1
//!  ├─ turn: estimate, sample ─┬─ step ──┬─ step ──┬─ … ──┬─ rest ──────────────┤
//!                             └ the coldest, an eighth of the budget each      └ or later, when nothing moves
//! ```
//!
//! It costs the guest at most one per cent of its time, and the host two wakes a period and step. A guest that does
//! nothing is looked at more and more rarely, up to every eighth period; its generations pass all the same. Nothing is
//! aged without a limit: then nobody needs to know.
//!
//! With *proactive* reclaim, what has been idle for two generations is evicted although nobody needs the memory, as long
//! as the guest asks for less than 0.2 % of its working set back a minute.

use std::ops::Range;
use std::time::Duration;

use memcg_core::frame::{BLOCK, FrameState, List, Walk};
use memcg_core::governor::{Governor, Seen, Terms};
use memcg_core::reclaim::BATCH;
use memcg_core::sample::{Arrivals, Estimate, FEW, Ranks, Sampler};
use memcg_core::units::Pages as Count;

use super::client::{Load, Run, Work};
use super::pages::Pages;
use crate::worker::gate::{self, monotonic_ns};

/// Room that what is moved aside needs for page tables, where nothing comes back for it: those of so many blocks.
const ROOM: Count = Count(64);

/// Steps of a period in which cold pages are put aside.
const STEPS: u32 = 8;

/// A guest that does nothing is looked at once in so many periods, at least.
const RAREST: u32 = 8;

/// Largest sample, in pages.
const SAMPLE: usize = 4096;

/// Pages of quiet stretches that are looked at for each that is wanted.
const LOOK: u64 = 8;

/// What a fault for a page that was aside costs the guest beside the answer: two hand-offs between threads, the fault that
/// maps the page again, and what it was kicked out for when pages were put aside. On a nested machine 350 µs, as its own
/// throughput says. Where that is cheaper, less is aged than could be.
const COST: Duration = Duration::from_micros(400);

/// What each page costs the guest that comes back with such a fault: where the host keeps its page tables for it, they have lost
/// it, and its next touch is an exit. A block of 2 MiB costs as much as two faults.
const PAGE_COST: Duration = Duration::from_micros(1);

/// Proactive reclaim stops at so many refaults a minute, in thousandths of the working set.
const PROMOTIONS: u64 = 2;

/// Generations after which proactive reclaim evicts.
const PROACTIVE_AGE: u16 = 2;

/// How a VM is aged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Length of a period; zero for no ageing.
    pub period: Duration,
    /// Evict what is cold before anybody needs the memory.
    pub proactive: bool,
}

/// Ageing of one VM.
#[derive(Debug)]
pub struct Ageing {
    terms: Plan,
    governor: Governor,
    /// There once ageing has begun: its cohorts take memory.
    sampler: Option<Sampler>,
    /// Whom the sample of this period still has to take.
    drawing: Option<(Ranks, Walk)>,
    estimate: Option<Estimate>,
    /// What is left of a quiet stretch between two pages of the sample, and the number of the next one.
    quiet_pages: Range<u32>,
    quiet_next: usize,
    /// When the period began, in nanoseconds; 0 before the first.
    began: u64,
    /// When there is something to do next.
    next: u64,
    step: u32,
    /// Pages that this period may still put aside.
    left: u64,
    /// Periods in a row in which nothing moved.
    quiet: u32,
    /// Totals at the begin of the period.
    before: Totals,
    /// Faults for pages that were aside, since the start, and the time that the answers took, in nanoseconds.
    refaults: u64,
    answers_ns: u64,
    /// Pages that proactive reclaim may still evict in this period.
    proactive: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    aged: u64,
    returned: u64,
    refaults: u64,
    answers_ns: u64,
    refaulted: u64,
    events: u64,
}

impl Totals {
    /// What a fault for a page that was aside has cost the guest since `before`.
    fn cost(&self, before: &Totals) -> Duration {
        let answers = Duration::from_nanos(self.answers_ns - before.answers_ns);
        let pages = u32::try_from(self.returned - before.returned).unwrap_or(u32::MAX);
        let faults = u32::try_from(self.refaults - before.refaults).unwrap_or(u32::MAX);
        COST + (answers + PAGE_COST * pages).checked_div(faults).unwrap_or_default()
    }
}

impl Ageing {
    /// Ageing that has not begun, of a guest with `cpus` vCPUs.
    pub fn new(terms: Plan, cpus: u32) -> Self {
        Self {
            terms,
            governor: Governor::new(Terms::new(cpus)),
            sampler: None,
            drawing: None,
            estimate: None,
            quiet_pages: 0..0,
            quiet_next: 0,
            began: 0,
            next: 0,
            step: 0,
            left: 0,
            quiet: 0,
            before: Totals::default(),
            refaults: 0,
            answers_ns: 0,
            proactive: 0,
        }
    }

    /// Pages that were aside have been touched, by one fault.
    pub fn touched(&mut self, pages: Range<u64>) {
        self.refaults += 1;
        if let Some(sampler) = &mut self.sampler {
            sampler.touched(pages.start as u32..pages.end as u32);
        }
    }

    /// An evicted page has been touched. One of the sample has cost a fault of its own: it does not come along with a
    /// neighbour, and may have been evicted because it was aside.
    pub fn refaulted(&mut self, page: u64) {
        if let Some(sampler) = &mut self.sampler {
            self.refaults += u64::from(sampler.touched(page as u32..page as u32 + 1));
        }
    }

    /// The answer to such a fault took so long, in nanoseconds.
    pub fn answered(&mut self, ns: u64) {
        self.answers_ns += ns;
    }

    /// The part of `pages` that may come back with `page`, which is touched: those of the sample wait for their own touch.
    pub fn unwatched(&self, page: u64, pages: Range<u64>) -> Range<u64> {
        let Some(sampler) = &self.sampler else { return pages };
        let pages = sampler.between(page as u32, pages.start as u32..pages.end as u32);
        pages.start.into()..pages.end.into()
    }

    /// Whether `page` is of the sample, and waits for its own touch.
    pub fn is_watched(&self, page: u64) -> bool {
        let before = page.saturating_sub(1);
        page > before && self.unwatched(before, before..page + 1).end <= page
    }

    /// Length of a period in milliseconds, 0 before the first.
    pub fn generation_ms(&self) -> u32 {
        if self.began == 0 { 0 } else { self.terms.period.as_millis() as u32 }
    }

    /// What the last sample said.
    pub fn estimate(&self) -> Option<Estimate> {
        self.estimate
    }

    /// Pages that proactive reclaim would evict now.
    pub fn proactive(&self) -> u64 {
        self.proactive
    }

    /// So many pages were evicted; where none could be, proactive reclaim is over for this period.
    pub fn evicted(&mut self, pages: u64) {
        self.proactive = if pages == 0 { 0 } else { self.proactive.saturating_sub(pages) };
    }
}

impl Pages {
    /// Whether this VM is aged: somebody has set it a limit, and it runs. One that waits for memory goes on in a moment. What is
    /// moved aside costs page tables: one that has no room for them, and of which nothing can be evicted, would be held for
    /// them, and gain nothing.
    fn is_aged(&self) -> bool {
        let runs = !self.gate.closed_for(!gate::NO_MEMORY);
        let pays = self.stock.room().is_some_and(|room| room >= ROOM || self.may_evict());
        !self.ageing.terms.period.is_zero() && pays && runs
    }

    /// Whether there is something to age, and nobody has a timer for it.
    pub(super) fn ageing_is_due(&self) -> bool {
        self.ageing.began == 0 && self.is_aged()
    }

    /// What is to be aged now, or when there will be something.
    pub(super) fn next_ageing(&mut self, load: &mut Load) -> Work {
        if self.sample(load) {
            return Work::Age;
        }
        if self.ageing.began == 0 {
            return Work::Rest(None);
        }
        if self.put_aside(load) {
            return Work::Age;
        }
        let left = self.ageing.next.saturating_sub(monotonic_ns());
        Work::Rest(Some(Duration::from_nanos(left.max(1))))
    }

    /// Cuts time into periods, and claims the next pages of the sample; false when it is complete. Memory that has to be
    /// found does not put it off: a guest that has less than it uses would never be known.
    pub(super) fn sample(&mut self, load: &mut Load) -> bool {
        if !self.is_aged() {
            // Whoever stands still uses nothing: it begins anew.
            (self.ageing.began, self.ageing.sampler, self.ageing.drawing) = (0, None, None);
            return false;
        }
        let now = monotonic_ns();
        if self.ageing.began == 0 {
            // A guest that has just begun is not what it will be.
            let period = self.ageing.terms.period.as_nanos() as u64;
            (self.ageing.began, self.ageing.step, self.ageing.next) = (now, STEPS, now + period);
        }
        if now >= self.ageing.next {
            if self.ageing.step == STEPS {
                self.turn(now);
            } else {
                self.ageing.step += 1;
                self.plan(now);
            }
        }
        self.draw(load)
    }

    /// A period ends and the next one begins.
    fn turn(&mut self, now: u64) {
        let counts = self.reclaim.counts;
        let totals = Totals {
            aged: counts.aged,
            returned: counts.returned,
            refaults: self.ageing.refaults,
            answers_ns: self.ageing.answers_ns,
            refaulted: counts.refaulted,
            events: self.counts.events,
        };
        let ageing = &mut self.ageing;
        let period = ageing.terms.period.as_nanos() as u64;
        let passed = ((now - ageing.began) / period).max(1);
        (0..passed.min(u64::from(RAREST))).for_each(|_| self.frames.advance_generation());
        let seen = Seen {
            period: ageing.terms.period,
            aside: totals.aged - ageing.before.aged,
            refaults: (totals.refaults - ageing.before.refaults) / passed,
            cost: totals.cost(&ageing.before),
        };
        ageing.left = ageing.governor.next(&seen);
        let arrivals = Arrivals { touched: Count(self.counts.touched), around: Count(self.counts.around) };
        let sampler = ageing.sampler.get_or_insert_with(|| Sampler::new(SAMPLE, now));
        if ageing.drawing.is_some() {
            sampler.spoil();
        }
        // The other half is for what is known to be cold. What is aside or evicted costs nothing to draw.
        let (kept, active) = (self.frames.kept(), self.frames.count(FrameState::Active));
        let most = ageing.left.div_ceil(2).saturating_mul(kept) / active.max(1);
        // With nothing to spare, few: the guest is slow for another reason, and wants to be known all the same.
        let most = most.max(4 * FEW);
        let (estimate, ranks) = sampler.turn(Count(kept), arrivals, most);
        let known = estimate.or(ageing.estimate.map(Estimate::stale));
        ageing.estimate = known.map(|estimate| estimate.within(Count(self.ram.pages())));
        ageing.drawing = Some((ranks, Walk::default()));
        (ageing.quiet_pages, ageing.quiet_next) = (0..0, 0);
        ageing.quiet = if totals.events == ageing.before.events { (2 * ageing.quiet).clamp(1, RAREST) } else { 0 };
        ageing.proactive = 0;
        if ageing.terms.proactive {
            let set = ageing.estimate.map_or(0, |estimate| estimate.pages.0);
            let bearable = set * PROMOTIONS * ageing.terms.period.as_millis() as u64 / 1000 / 60_000;
            let cold: Count = self.frames.ages().pages[usize::from(PROACTIVE_AGE)..].iter().copied().sum();
            if totals.refaulted - ageing.before.refaulted <= bearable && estimate.is_some() {
                ageing.proactive = cold.0.min(self.frames.count(FrameState::Idle));
            }
        }
        (ageing.before, ageing.began, ageing.step) = (totals, now, 0);
        self.plan(now);
    }

    /// When the next step is due: an eighth of the period later; with nothing to do but to wait, at its end.
    fn plan(&mut self, now: u64) {
        let ageing = &mut self.ageing;
        let period = ageing.terms.period.as_nanos() as u64;
        if ageing.left == 0 || ageing.quiet > 0 || ageing.step == STEPS {
            ageing.step = STEPS;
            let periods = u64::from(ageing.quiet.max(1));
            ageing.next = (ageing.began + periods * period).max(now + period / u64::from(STEPS));
        } else {
            ageing.next = now + period / u64::from(STEPS);
        }
    }

    /// Claims the next pages of the sample; false when it is complete.
    fn draw(&mut self, load: &mut Load) -> bool {
        let Some((mut ranks, mut walk)) = self.ageing.drawing.take() else { return false };
        let Some(mut sampler) = self.ageing.sampler.take() else { return false };
        let (mut claimed, mut looks, mut is_over) = (0, 0, false);
        while claimed < BATCH && looks < BATCH && !is_over {
            let rank = ranks.next();
            is_over = rank.is_none();
            looks += 1;
            let Some(page) = rank.and_then(|rank| self.frames.kept_at(&mut walk, rank)) else { continue };
            claimed += self.claim_one(page, load);
            // One that stays where it is says nothing of its touches.
            if self.frames.state(page) != FrameState::Active {
                sampler.add(page as u32);
            }
        }
        self.ageing.sampler = Some(sampler);
        self.ageing.left = self.ageing.left.saturating_sub(claimed);
        if !is_over {
            self.ageing.drawing = Some((ranks, walk));
        }
        !is_over || claimed > 0
    }

    /// Claims a page to be moved aside, unless it is in no state for that; the whole block where that is one huge page,
    /// which a single one would split. Returns how many pages that are.
    fn claim_one(&mut self, page: usize, load: &mut Load) -> u64 {
        if self.frames.state(page) != FrameState::Active || self.frames.pinned(page) || self.frames.wanted(page) {
            return 0;
        }
        let block = self.frames.whole_block(page).filter(|_| self.ram.is_huge(page as u64));
        let pages = block.unwrap_or(page..page + 1);
        self.frames.set_range(pages.start, pages.end, FrameState::Moving);
        let (first, pages) = (pages.start as u64, pages.len() as u64);
        if let Some(present) = self.ram.present() {
            present.clear(first..first + pages);
        }
        Run::append(&mut load.claimed, first, pages);
        pages
    }

    /// Claims about `want` pages of the quiet stretches; false when there were none.
    fn claim_quiet(&mut self, want: u64, load: &mut Load) -> bool {
        let (mut claimed, mut looks) = (0, LOOK * want);
        while claimed < want && looks > 0 {
            let Some(page) = self.ageing.quiet_pages.next() else {
                let Some(sampler) = &self.ageing.sampler else { break };
                let Some(pages) = sampler.quiet_after(&mut self.ageing.quiet_next) else { break };
                self.ageing.quiet_pages = pages;
                continue;
            };
            looks -= 1;
            claimed += self.claim_one(page as usize, load);
        }
        claimed > 0
    }

    /// Claims the coldest active pages, as many as this step may: quiet ones, and then from the cold end of the list, by
    /// blocks where they are alike.
    fn put_aside(&mut self, load: &mut Load) -> bool {
        let step = self.ageing.governor.budget().div_ceil(u64::from(STEPS));
        let due = step * u64::from(self.ageing.step + 1);
        let done = self.ageing.governor.budget().saturating_sub(self.ageing.left);
        let want = due.saturating_sub(done).min(self.ageing.left).min(2 * BLOCK as u64);
        if want == 0
            || self.ageing.quiet > 0
            || !(self.claim_quiet(want, load) || self.claim(List::Active, want, false, &mut load.claimed))
        {
            self.ageing.left = if want == 0 { self.ageing.left } else { 0 };
            return false;
        }
        let claimed: u64 = load.claimed.iter().map(|run| run.pages).sum();
        self.ageing.left = self.ageing.left.saturating_sub(claimed);
        true
    }
}
