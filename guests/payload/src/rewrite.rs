//! Rewrites pages as fast as it can, and looks at each before: what was written last must be in it, to the last byte.
//!
//! Each vCPU goes over its own share in passes. In a pass every page gets the next version of its contents, which depend
//! on the version, the page's number and the word's; so the version that a page must hold is known without being kept
//! anywhere, and a page that was lost, is an old copy, or is partly one and partly the other is found.

use core::fmt::Write;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use guest_common::{Arguments, Fill, PAGE_SIZE, PAGE_WORDS, scramble};

use crate::Error;
use crate::io::{self, Line};
use crate::memory::{peek, poke};
use crate::team;

static STOP: AtomicBool = AtomicBool::new(false);
static REWRITES: AtomicU64 = AtomicU64::new(0);
static BAD: AtomicU64 = AtomicU64::new(0);
/// Of the bad pages, one.
static BAD_PAGE: AtomicU64 = AtomicU64::new(0);
/// What is rewritten: from which page, how many, from which seed.
static RANGE: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
/// In the background vCPU 0 has no share.
static BACKGROUND: team::Job<'static> = &|cpu, cpus| Share::of(cpu - 1, cpus - 1).run(None);

/// `rewrite`: see the list of commands. Without `seconds` until somebody types.
pub fn rewrite(arguments: Arguments<'_>, cpus: u64, answer: &mut Line) -> Result<(), Error> {
    if arguments.word(0) == Some("stop") {
        STOP.store(true, Relaxed);
        let stopped = team::finish();
        return if stopped { result(answer) } else { Err(Error::Other("nothing is being rewritten")) };
    }
    let (start, size) = (arguments.number(0, "START")?, arguments.number(1, "SIZE")?);
    let (seconds, seed) = (arguments.number_or("seconds", 0)?, arguments.number_or("seed", 1)?);
    let background = arguments.number_or("background", 0)? != 0;
    let pages = size / PAGE_SIZE;
    if start % PAGE_SIZE != 0 || pages < cpus || start.checked_add(size).is_none() {
        return Err(Error::Other("START must be a multiple of 4K, and SIZE a page for each vCPU"));
    }
    if team::is_busy() {
        return Err(Error::Other("the other vCPUs are busy: rewrite stop"));
    }
    STOP.store(false, Relaxed);
    [&REWRITES, &BAD].into_iter().for_each(|count| count.store(0, Relaxed));
    RANGE.iter().zip([start / PAGE_SIZE, pages, seed]).for_each(|(shared, value)| shared.store(value, Relaxed));
    if background {
        return if team::begin(cpus, &BACKGROUND) { Ok(()) } else { Err(Error::Other("there is no other vCPU")) };
    }
    let per_ms = io::cycles_per_ms();
    io::answer("", "rewriting", "");
    team::together(cpus, &|cpu, cpus| Share::of(cpu, cpus).run((cpu == 0).then(|| Watch::new(seconds, per_ms))));
    result(answer)
}

/// What all of them have found.
fn result(answer: &mut Line) -> Result<(), Error> {
    let (rewrites, bad) = (REWRITES.load(Relaxed), BAD.load(Relaxed));
    let _ = write!(answer, " pages={} rewrites={rewrites} bad={bad}", RANGE[1].load(Relaxed));
    if bad == 0 {
        return Ok(());
    }
    let _ = write!(answer, " page={:#x}", BAD_PAGE.load(Relaxed) * PAGE_SIZE);
    Err(Error::Other("contents differ"))
}

/// How vCPU 0 knows that it is enough.
struct Watch {
    end: Option<u64>,
    /// When it looks at the serial port next, and how many cycles after that: a look is an exit.
    look: u64,
    pause: u64,
}

impl Watch {
    fn new(seconds: u64, cycles_per_ms: u64) -> Self {
        let now = io::cycles();
        let end = (seconds > 0).then(|| now + seconds * 1000 * cycles_per_ms);
        Self { end, look: now, pause: 20 * cycles_per_ms }
    }

    fn enough(&mut self) -> bool {
        let now = io::cycles();
        match self.end {
            Some(end) => now >= end,
            None if now >= self.look => {
                self.look = now + self.pause;
                io::wanted()
            }
            None => false,
        }
    }
}

/// The pages of one vCPU, by number.
struct Share {
    first: u64,
    pages: u64,
    seed: u64,
}

impl Share {
    /// The share of vCPU `cpu`: stretches of equal length.
    fn of(cpu: u64, cpus: u64) -> Self {
        let [first, pages, seed] = [0, 1, 2].map(|i: usize| RANGE[i].load(Relaxed));
        let at = |n: u64| pages * n / cpus;
        Self { first: first + at(cpu), pages: at(cpu + 1) - at(cpu), seed }
    }

    /// Rewrites until it is enough, which the vCPU with a watch says, and then looks at all of them once more.
    fn run(&self, mut watch: Option<Watch>) {
        let factor = scramble(self.pages);
        // Another order in each pass, so that no pass follows in the steps of what happened in the last one.
        let page = |pass: u64, i: u64| self.first + (i * factor + pass * 7) % self.pages;
        let (mut pass, mut i) = (0, 0);
        loop {
            if watch.as_mut().is_some_and(Watch::enough) {
                STOP.store(true, Relaxed);
            }
            if STOP.load(Relaxed) {
                break;
            }
            let number = page(pass, i);
            if pass > 0 {
                self.check(number, pass - 1);
            }
            self.write(number, pass);
            i += 1;
            if i == self.pages {
                (pass, i) = (pass + 1, 0);
            }
        }
        for k in 0..self.pages {
            // In an unfinished pass, those before `i` are a version ahead.
            match pass {
                0 if k >= i => {}
                _ => self.check(page(pass, k), if k < i { pass } else { pass - 1 }),
            }
        }
        REWRITES.fetch_add(pass * self.pages + i, Relaxed);
    }

    fn write(&self, page: u64, version: u64) {
        (0..PAGE_WORDS).for_each(|word| poke(page * PAGE_SIZE + word as u64 * 8, self.contents(version, page, word)));
    }

    fn check(&self, page: u64, version: u64) {
        let same = |word: usize| peek(page * PAGE_SIZE + word as u64 * 8) == self.contents(version, page, word);
        if !(0..PAGE_WORDS).all(same) {
            BAD.fetch_add(1, Relaxed);
            BAD_PAGE.store(page, Relaxed);
        }
    }

    /// A word of a version. The first half of a page differs in each word of each version; the second repeats one word of
    /// it, so that the page is worth compressing.
    fn contents(&self, version: u64, page: u64, word: usize) -> u64 {
        Fill::Mixed.value(self.seed + version, page, word)
    }
}
