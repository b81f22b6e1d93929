//! Touching memory, and finding out whether what was written is still there.
//!
//! The pattern in a page depends on a seed and on the page's own number, so any part of what was touched can be
//! verified, and a page which was lost, zeroed or exchanged for another is found.

use core::fmt::Write;

use guest_common::{Arguments, Fill, PAGE_SIZE, pattern};

use crate::Error;
use crate::io::{self, Line};
use crate::team;

/// What `storm` touches if it is not told: from here, past this program, to the end of RAM below the hole.
const STORM_START: u64 = 2 << 20;
/// RAM below 4 GiB ends here at the latest.
const LOW_RAM_END: u64 = 3 << 30;
/// The word in which `hot` counts: never one of those that hold the short pattern.
const COUNTER_WORD: u64 = 1;

/// Reads the word at `address`.
pub fn peek(address: u64) -> u64 {
    // SAFETY: all of this guest's RAM is mapped and none of it but this program's own is in use; the ranges are the
    // caller's choice, and a wrong one ends this guest and nobody else.
    unsafe { (address as *const u64).read_volatile() }
}

/// Writes the word at `address`.
pub fn poke(address: u64, value: u64) {
    // SAFETY: as for `peek`.
    unsafe { (address as *mut u64).write_volatile(value) }
}

/// One stretch of pages and what is to be done with it.
#[derive(Clone, Copy)]
struct Work {
    start: u64,
    end: u64,
    stride: u64,
    seed: u64,
    passes: u64,
    fill: Fill,
    read: bool,
    /// The mark that comes before each page.
    mark: Option<u32>,
}

impl Work {
    /// `START SIZE [stride=4K] [seed=1] [passes=1] [mode=write|read] [full=1 | fill=ends|half|mixed|same|full] [mark=N]`
    fn parse(arguments: Arguments<'_>) -> Result<Self, Error> {
        let start = arguments.number(0, "START")?;
        let size = arguments.number(1, "SIZE")?;
        let stride = arguments.number_or("stride", PAGE_SIZE)?;
        if start % PAGE_SIZE != 0 || stride == 0 || stride % PAGE_SIZE != 0 {
            return Err(Error::Other("START and stride must be multiples of 4K"));
        }
        let end = start.checked_add(size).ok_or(Error::Other("START + SIZE is too large"))?;
        let read = match arguments.option("mode") {
            None | Some("write") => false,
            Some("read") => true,
            Some(_) => return Err(Error::Other("mode must be read or write")),
        };
        let (seed, passes) = (arguments.number_or("seed", 1)?, arguments.number_or("passes", 1)?);
        let mark = arguments.option("mark").map(|_| arguments.number_or("mark", 0).map(io::dword)).transpose()?;
        Ok(Self { start, end, stride, seed, passes, fill: arguments.fill()?, read, mark })
    }

    fn pages(&self) -> u64 {
        (self.end - self.start).div_ceil(self.stride)
    }

    fn addresses(&self) -> impl Iterator<Item = u64> + use<> {
        let Work { start, stride, .. } = *self;
        (0..self.pages()).map(move |i| start + i * stride)
    }

    /// The share of vCPU `cpu`: stretches of equal length.
    fn share(&self, cpu: u64, cpus: u64) -> Self {
        let pages = self.pages();
        let at = |n: u64| (self.start + pages * n / cpus * self.stride).min(self.end);
        Self { start: at(cpu), end: at(cpu + 1), ..*self }
    }

    fn run(&self) {
        for _ in 0..self.passes {
            for page in self.addresses() {
                if let Some(mark) = self.mark {
                    io::mark(mark);
                }
                if self.read {
                    peek(page);
                } else {
                    fill(page, self.seed, self.fill);
                }
            }
        }
    }
}

fn fill(page: u64, seed: u64, fill: Fill) {
    for word in fill.words() {
        poke(page + word as u64 * 8, fill.value(seed, page / PAGE_SIZE, word));
    }
}

/// `touch`: writes or reads each page.
pub fn touch(arguments: Arguments<'_>, cpus: u64, answer: &mut Line) -> Result<(), Error> {
    let work = Work::parse(arguments)?;
    let cpus = if arguments.option("cpus") == Some("all") { cpus } else { 1 };
    let before = io::cycles();
    let cpus = team::together(cpus, &|cpu, cpus| work.share(cpu, cpus).run());
    let spent = io::cycles().wrapping_sub(before);
    let _ = write!(answer, " pages={} passes={} cpus={cpus} cycles={spent}", work.pages(), work.passes);
    Ok(())
}

/// `storm`: touches with all vCPUs, for ever if `passes` is not given.
pub fn storm(arguments: Arguments<'_>, ram: u64, cpus: u64, answer: &mut Line) -> Result<(), Error> {
    let mut work = if arguments.word(0).is_some() {
        Work::parse(arguments)?
    } else {
        let end = ram.min(LOW_RAM_END);
        Work {
            start: STORM_START.min(end),
            end,
            stride: PAGE_SIZE,
            seed: 1,
            passes: 1,
            fill: Fill::Ends,
            read: false,
            mark: None,
        }
    };
    work.passes = arguments.number_or("passes", u64::MAX)?;
    if work.passes == u64::MAX {
        io::answer("OK ", "storm", " started");
    }
    let cpus = team::together(cpus, &|cpu, cpus| work.share(cpu, cpus).run());
    let _ = write!(answer, " pages={} passes={} cpus={cpus}", work.pages(), work.passes);
    Ok(())
}

/// `random`: writes pages drawn at random, some of them perhaps more than once.
pub fn random(arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
    let work = Work::parse(arguments)?;
    let count = arguments.number_or("count", 0)?;
    if work.pages() == 0 {
        return Err(Error::Other("SIZE must not be 0"));
    }
    for draw in 0..count {
        let page = work.start + pattern(work.seed, draw, 1) / 2 % work.pages() * work.stride;
        fill(page, work.seed, work.fill);
    }
    let _ = write!(answer, " touches={count}");
    Ok(())
}

/// `hot`: adds one to a counter in each page, each pass. The counters of all pages agree, or writes were lost.
pub fn hot(arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
    let work = Work::parse(arguments)?;
    let mut lost = 0u64;
    for pass in 0..work.passes {
        for page in work.addresses() {
            let counter = page + COUNTER_WORD * 8;
            let value = if pass == 0 { 0 } else { peek(counter) };
            lost += u64::from(value != pass);
            poke(counter, pass + 1);
        }
    }
    let _ = write!(answer, " pages={} passes={} lost={lost}", work.pages(), work.passes);
    if lost == 0 { Ok(()) } else { Err(Error::Other("writes were lost")) }
}

/// `verify`: reads each page and compares. With `zero=ok` a page may be all zeroes instead, with `zero=only` it must.
pub fn verify(arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
    let work = Work::parse(arguments)?;
    let (may_be_zero, may_be_pattern) = match arguments.option("zero") {
        None => (false, true),
        Some("ok") => (true, true),
        Some("only") => (true, false),
        Some(_) => return Err(Error::Other("zero must be ok or only")),
    };
    let (mut zero, mut bad, mut first) = (0u64, 0u64, None);
    for page in work.addresses() {
        let (mut all_zero, mut all_pattern) = (true, true);
        for word in work.fill.words() {
            let value = peek(page + word as u64 * 8);
            all_zero &= value == 0;
            all_pattern &= value == work.fill.value(work.seed, page / PAGE_SIZE, word);
        }
        zero += u64::from(all_zero);
        if !(all_zero && may_be_zero || all_pattern && may_be_pattern) {
            bad += 1;
            first.get_or_insert(page);
        }
    }
    let _ = write!(answer, " pages={} zero={zero} bad={bad}", work.pages());
    let Some(page) = first else { return Ok(()) };
    let _ = write!(answer, " first={page:#x} value={:#x}", peek(page));
    Err(Error::Other("contents differ"))
}
