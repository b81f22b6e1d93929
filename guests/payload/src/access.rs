//! A guest with a known working set: it accesses pages by a pattern, for ever or for some periods, and after each period
//! says how fast it was and how many pages it has used. That is the truth which an estimate from outside is held against.

use core::fmt::Write;

use guest_common::{Access, Arguments, PAGE_SIZE, Pattern, pattern};

use crate::Error;
use crate::io::{self, Line};
use crate::memory::{peek, poke};

/// The books: for each page of the range a 32-bit number, the last period that used it. Here in guest RAM, past this
/// program: a page of books for 4 MiB.
const BOOKS: u64 = 2 << 20;
/// The word that writes go to: never one of those that hold the pattern.
const WRITTEN_WORD: u64 = 1;
/// Accesses between two looks at the clock.
const BURST: u64 = 64;

/// What is done in each period, and how it ends.
struct Plan {
    start: u64,
    pages: u64,
    seed: u64,
    check: bool,
    /// Of 100 accesses, how many write.
    write: u64,
    /// A period's length in milliseconds, if it has one.
    period_ms: u64,
    /// A period's accesses, if not its length is given.
    each: u64,
}

/// What happened, in a period or in all.
#[derive(Clone, Copy, Default)]
struct Sums {
    touches: u64,
    cycles: u64,
    /// Pages used.
    distinct: u64,
    /// Of them, those that the period before had used as well.
    again: u64,
    /// Of them, those that no period before had used.
    first: u64,
    bad: u64,
}

/// `access`: see the list of commands.
pub fn access(arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
    let pattern = arguments.word(0).and_then(Pattern::parse).ok_or(Error::Other("hot|zipf|scan|phase|idle"))?;
    let (start, size) = (arguments.number(1, "START")?, arguments.number(2, "SIZE")?);
    let plan = Plan {
        start,
        pages: size / PAGE_SIZE,
        seed: arguments.number_or("seed", 1)?,
        check: arguments.number_or("check", 0)? != 0,
        write: arguments.number_or("write", 50)?,
        period_ms: arguments.number_or("period", 1000)?.max(1),
        each: arguments.number_or("each", 0)?,
    };
    if start % PAGE_SIZE != 0 || plan.pages == 0 || start.checked_add(size).is_none() {
        return Err(Error::Other("START must be a multiple of 4K, and SIZE not 0"));
    }
    if BOOKS + plan.pages * 4 > start {
        return Err(Error::Other("START must be higher: the books are from 2M on, 1K for each 1M"));
    }
    let hot = arguments.number_or("hot", size)? / PAGE_SIZE;
    let spread = arguments.number_or("spread", 0)? != 0;
    let (periods, moves) = (arguments.number_or("periods", 0)?, arguments.number_or("moves", 4)?.max(1));
    let mut next = Access::new(pattern, plan.pages, hot, spread, plan.seed);
    (0..plan.pages.div_ceil(2)).for_each(|pair| poke(BOOKS + pair * 8, 0));
    let length = plan.period_ms * io::cycles_per_ms();
    let (mut sums, mut before, mut period) = (Sums::default(), 0, 0);
    while (periods == 0 || period < periods) && !io::wanted() {
        period += 1;
        let now = plan.run(&mut next, period, length);
        io::mark(io::dword(period));
        now.print(period, before);
        before = now.distinct;
        sums.add(now);
        if period % moves == 0 && pattern == Pattern::Phase {
            next.moves();
        }
    }
    let Sums { touches, cycles, first, bad, .. } = sums;
    let _ = write!(answer, " periods={period} touches={touches} cycles={cycles} distinct={first} bad={bad}");
    if bad == 0 { Ok(()) } else { Err(Error::Other("contents differ")) }
}

impl Plan {
    /// One period.
    fn run(&self, next: &mut Access, period: u64, length: u64) -> Sums {
        let mut sums = Sums::default();
        let begin = io::cycles();
        loop {
            let burst = if self.each > 0 { BURST.min(self.each - sums.touches) } else { BURST };
            for _ in 0..burst {
                match next.next() {
                    Some(page) => self.touch(page, period, &mut sums),
                    None => {
                        io::wait(io::dword(self.period_ms));
                        return sums;
                    }
                }
            }
            sums.cycles = io::cycles().wrapping_sub(begin);
            if if self.each > 0 { sums.touches >= self.each } else { sums.cycles >= length } {
                return sums;
            }
        }
    }

    fn touch(&self, page: u64, period: u64, sums: &mut Sums) {
        let address = self.start + page * PAGE_SIZE;
        sums.touches += 1;
        if Access::writes(sums.touches, self.write) {
            poke(address + WRITTEN_WORD * 8, period);
        } else {
            let value = peek(address);
            sums.bad += u64::from(self.check && value != pattern(self.seed, address / PAGE_SIZE, 0));
        }
        let last = book(page);
        if u64::from(last) != period {
            sums.distinct += 1;
            sums.again += u64::from(last != 0 && u64::from(last) + 1 == period);
            sums.first += u64::from(last == 0);
            keep(page, period as u32);
        }
    }
}

impl Sums {
    /// Prints the period's line. `before` is how many pages the last one used.
    fn print(&self, period: u64, before: u64) {
        let Sums { touches, cycles, distinct, again, bad, .. } = *self;
        let each = (cycles * 1000).checked_div(touches).unwrap_or(0);
        let mut line = Line::new();
        // It fits.
        let _ = writeln!(
            line,
            "ACCESS n={period} touches={touches} cycles_per_1000={each} distinct={distinct} two={} bad={bad}",
            before + distinct - again
        );
        io::print(line.text());
    }

    fn add(&mut self, now: Sums) {
        self.touches += now.touches;
        self.cycles += now.cycles;
        self.first += now.first;
        self.bad += now.bad;
    }
}

/// The last period that used a page; 0 for none.
fn book(page: u64) -> u32 {
    let pair = peek(BOOKS + page / 2 * 8);
    (pair >> (page % 2 * 32)) as u32
}

fn keep(page: u64, period: u32) {
    let (address, shift) = (BOOKS + page / 2 * 8, page % 2 * 32);
    let other = peek(address) & !(u64::from(u32::MAX) << shift);
    poke(address, other | u64::from(period) << shift);
}
