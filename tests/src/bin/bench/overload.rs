//! The same overload of a small host under three keepers: ballast, earlyoom, and the kernel's own OOM killer.
//!
//! Three Linux guests have cold memory that shrinks, and processes beside them want [`EXCESS`] more than there is: one that is
//! larger than any guest, or eight that are smaller. With ballast the guests live under one `serve`, which watches the host, and one
//! of them, [`OFFERED`], may go first. With the other two the same guests live under three `run`, which watch nothing, so nobody
//! but that keeper acts. earlyoom runs as Debian's package starts it.
//!
//! ```text
//!  available ─┐
//!    10 % ────┴──┐ the overload begins: earlyoom's mark, the first of all
//!     5 % ───────┴─┐        ┌── relief: it is never below this any more (below 10 %, if it never was below this)
//!                  └────────┘
//! ```
//!
//! The host is used up, so it is a nested one ([`hog::is_small_host`]), and has no swap.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ballast_tests::hog::{self, Hog};
use ballast_tests::serve::{Console, Serve, is_alive, pid};
use ballast_tests::{TestVm, deadline, guest_file};
use serde_json::json;

use crate::{Goal, MIB, Outcome};

/// The benchmarks of this file.
pub const IDS: [&str; 2] = ["overload", "overload8"];

/// The guests: name, and preference when somebody has to go.
const GUESTS: [(&str, &str); 3] = [("web", "omit"), ("db", "avoid"), (OFFERED, "none")];
/// The guest that may go.
const OFFERED: &str = "batch";
/// RAM of each, and what each has written to.
const SIZE: u64 = 288 * MIB;
const USES: u64 = 144 * MIB;
/// The command line of each.
const CMDLINE: &str = "quiet panic=-1 pci=off";
/// What the processes want beside all that the host has left.
const EXCESS: u64 = 96 * MIB;
/// What they take at a time, all together.
const BITE: u64 = 4 * MIB;
/// How long things are looked at once all processes have what they want or are gone, and in all at most.
const AFTER: Duration = Duration::from_secs(15);
const PATIENCE: u64 = 60;
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// Who acts when the host runs short.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keeper {
    Ballast,
    Earlyoom,
    Kernel,
}

const KEEPERS: [(Keeper, &str); 3] =
    [(Keeper::Ballast, "ballast"), (Keeper::Earlyoom, "earlyoom"), (Keeper::Kernel, "kernel")];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    if !hog::is_small_host() {
        return Err("uses-up-its-host,-so-it-is-for-a-nested-one-(scripts/bench-knows-how)".to_owned());
    }
    let earlyoom = std::env::var_os("BALLAST_EARLYOOM").map(PathBuf::from).filter(|path| path.is_file());
    let earlyoom = earlyoom.ok_or("BALLAST_EARLYOOM-names-no-program")?;
    // As on a host of somebody's.
    crate::vm::huge_pages(true);
    let (id, hogs) = if id == IDS[0] { (IDS[0], 1) } else { (IDS[1], 8) };
    let mut notes = String::new();
    let mut unasked = 0;
    for (keeper, name) in KEEPERS {
        let end = play(keeper, &earlyoom, hogs);
        println!("OVERLOAD {name} hogs={hogs} {}", end.line());
        let relief = end.relief.map_or("none".to_owned(), |time| format!("{:.1}", time.as_secs_f64()));
        notes += &format!("{name}_relief_s={relief} {name}_died={} ", end.died());
        if keeper == Keeper::Ballast {
            unasked = end.gone.iter().filter(|gone| *gone != OFFERED).count();
        }
    }
    crate::vm::huge_pages(false);
    let goal = Goal::AtMost { floor: 0.0, target: 0.0 };
    Ok(Outcome { id, name: "died_unasked", unit: "deaths", goal, values: vec![unasked as f64], notes })
}

/// What an overload came to.
struct End {
    /// From the beginning of the overload until relief; `None` when there was none of the two.
    relief: Option<Duration>,
    /// How long there was little memory left, and what there was at its lowest, in bytes.
    short: Duration,
    lowest: u64,
    /// Time in which all tasks waited for memory.
    stalled: Option<Duration>,
    /// Who has died: guests by name, and `hog`.
    gone: Vec<String>,
    /// How many the kernel has killed.
    kernel_kills: u64,
    /// What the processes that live have, in bytes, and what all wanted.
    has: u64,
    wanted: u64,
}

impl End {
    fn died(&self) -> String {
        if self.gone.is_empty() { "nobody".to_owned() } else { self.gone.join(",") }
    }

    fn line(&self) -> String {
        let seconds =
            |time: Option<Duration>| time.map_or("none".to_owned(), |time| format!("{:.1}", time.as_secs_f64()));
        format!(
            "relief_s={} below_5_percent_s={} lowest_mib={} stalled_s={} died={} kernel_kills={} hogs_have_mib={} of={}",
            seconds(self.relief),
            seconds(Some(self.short)),
            self.lowest / MIB,
            seconds(self.stalled),
            self.died(),
            self.kernel_kills,
            self.has / MIB,
            self.wanted / MIB,
        )
    }
}

/// Three guests that live, with whatever keeps them.
struct Guests {
    /// Name and worker of each.
    workers: Vec<(&'static str, u32)>,
    _consoles: Vec<Console>,
    _serve: Option<Serve>,
    _runs: Vec<TestVm>,
}

impl Guests {
    /// Under one controller that watches the host.
    fn watched() -> Self {
        let serve = Serve::start(&[]);
        let mut guests = Self { workers: Vec::new(), _consoles: Vec::new(), _serve: None, _runs: Vec::new() };
        for (name, preference) in GUESTS {
            let config = json!({
                "kernel": guest_file("vmlinux"), "initrd": guest_file("initrd.img"), "cmdline": CMDLINE,
                "memory": { "size_bytes": SIZE, "track": true, "swap_max_bytes": null, "ageing_s": 10 },
                "oom": { "action": "kill", "preference": preference },
            });
            let view = serve.create_with(name, &config);
            let mut console = Console::of(&view);
            console.expect("READY", 60);
            console.send(&touch());
            console.expect("OK", 120);
            guests.workers.push((name, pid(&view)));
            guests._consoles.push(console);
        }
        guests._serve = Some(serve);
        guests
    }

    /// Each under a controller of its own that watches nothing but its VM.
    fn alone() -> Self {
        let mut guests = Self { workers: Vec::new(), _consoles: Vec::new(), _serve: None, _runs: Vec::new() };
        for (name, _) in GUESTS {
            let mut vm = TestVm::builder(name)
                .kernel(&guest_file("vmlinux"))
                .option("--initrd", guest_file("initrd.img").to_string_lossy())
                .cmdline(CMDLINE)
                .memory(&format!("size={}M,track=on,swap=max,ageing=10s", SIZE / MIB))
                .start();
            vm.expect("READY", 60);
            let answer = vm.command(&touch(), 120);
            assert!(answer.starts_with("OK"), "{name}: {answer}");
            guests.workers.push((name, pid(&vm.show())));
            guests._runs.push(vm);
        }
        guests
    }
}

/// What each guest does: it takes memory, and uses it no more.
fn touch() -> String {
    format!("touch {USES} seed=2 fill=mixed")
}

/// earlyoom, until it is dropped. What it says goes to the end of this program's errors.
struct Daemon {
    child: Child,
    log: PathBuf,
    _place: tempfile::TempDir,
}

impl Daemon {
    fn start(program: &PathBuf) -> Self {
        let place = tempfile::tempdir().expect("a temporary directory");
        let log = place.path().join("log");
        let file = File::create(&log).expect("a new file");
        let both = file.try_clone().expect("a descriptor");
        // As `/etc/default/earlyoom` of the package has it.
        let child = Command::new(program).args(["-r", "3600"]).stdin(Stdio::null()).stdout(file).stderr(both).spawn();
        Self { child: child.expect("earlyoom starts"), log, _place: place }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        eprint!("{}", std::fs::read_to_string(&self.log).unwrap_or_default());
    }
}

/// One overload.
fn play(keeper: Keeper, earlyoom: &PathBuf, hogs: u64) -> End {
    let guests = if keeper == Keeper::Ballast { Guests::watched() } else { Guests::alone() };
    let _daemon = (keeper == Keeper::Earlyoom).then(|| Daemon::start(earlyoom));
    let (total, kills, stalled) = (hog::total(), hog::oom_kills(), hog::stalled());
    let wanted = hog::available() + EXCESS;
    let words = ["child", "overload", &(wanted / hogs).to_string(), &(BITE / hogs).to_string()];
    let mut hogs: Vec<Hog> = (0..hogs).map(|_| Hog::start(&words)).collect();
    let mut below = [Below::new(total / 10), Below::new(total / 20)];
    let (start, mut lowest, mut done) = (Instant::now(), u64::MAX, None);
    while done.is_none_or(|done: Instant| done.elapsed() < AFTER) && start.elapsed() < deadline(PATIENCE) {
        let available = hog::available();
        lowest = lowest.min(available);
        below.iter_mut().for_each(|below| below.look(available));
        let want = hogs.iter_mut().any(|hog| !hog.has_all() && hog.lives());
        done = if want { None } else { done.or(Some(Instant::now())) };
        std::thread::sleep(LOOK);
    }
    let [mark, little] = &below;
    let relief = if little.first.is_some() { little.until } else { mark.until };
    let dead = guests.workers.iter().filter(|(_, worker)| !is_alive(*worker)).map(|(name, _)| (*name).to_owned());
    let mut gone: Vec<String> = dead.collect();
    gone.extend(hogs.iter_mut().filter_map(|hog| (!hog.lives()).then(|| "hog".to_owned())));
    End {
        relief: mark.first.zip(relief).map(|(first, relief)| relief - first),
        short: little.time,
        lowest,
        stalled: hog::stalled().zip(stalled).map(|(now, before)| now - before),
        gone,
        kernel_kills: hog::oom_kills() - kills,
        has: hogs.iter_mut().map(|hog| if hog.lives() { hog.resident() } else { 0 }).sum(),
        wanted,
    }
}

/// When there was less than so much available.
struct Below {
    mark: u64,
    /// When that began first, and since when it is over for good.
    first: Option<Instant>,
    until: Option<Instant>,
    time: Duration,
    /// The last look.
    looked: Instant,
}

impl Below {
    fn new(mark: u64) -> Self {
        Self { mark, first: None, until: None, time: Duration::ZERO, looked: Instant::now() }
    }

    /// So much is available now, and was for all that is known since the last look.
    fn look(&mut self, available: u64) {
        let now = Instant::now();
        if available < self.mark {
            self.first = self.first.or(Some(now));
            self.until = None;
            self.time += now - self.looked;
        } else if self.first.is_some() {
            self.until = self.until.or(Some(now));
        }
        self.looked = now;
    }
}

/// A process of an overload; `words` are the arguments of this program for one.
pub fn child(words: &[String]) -> bool {
    let [what, bytes, bite] = words else { return false };
    if what != "overload" {
        return false;
    }
    let number = |word: &String| word.parse().expect("a number of bytes");
    hog::take(number(bytes), number(bite))
}
