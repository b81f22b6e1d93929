//! `ballast top`: a host while one looks at it.
//!
//! ```text
//!  keys (a thread) ──┐
//!  every second ─────┼─► Screen (pure: what is known, how it is sorted) ─► lines ─► the terminal, or one page of text
//!  signals ──────────┘
//! ```
//!
//! One request a controller and refresh (`GET /overview`): VMs do not notice that somebody looks. The terminal is as it was
//! before after every way out, a panic and a signal included.

mod screen;

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::widgets::Paragraph;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::signals::Signals;
use super::{DONE, Failure, SocketArg, client, output, socket};
use crate::controller::overview::Overview;
use screen::{Screen, Sort};

/// Time between two refreshes.
const REFRESH: Duration = Duration::from_secs(1);

/// Refreshes after which controllers are looked for again.
const LOOK_AROUND: u32 = 10;

/// Events that are asked for.
const EVENTS: usize = 20;

/// Columns of a page when nobody says how wide it may be.
const PAGE_WIDTH: u16 = 120;

/// `ballast top`.
#[derive(Debug, clap::Args)]
pub struct TopArgs {
    /// Sort by this at first
    #[arg(long, value_enum, default_value_t = Sort::Usage)]
    sort: Sort,
    /// Only VMs of this group and of those in it
    #[arg(long, value_name = "PATH")]
    group: Option<String>,
    /// Print one page and end, as when the output is no terminal, or one without a cursor
    #[arg(long)]
    batch: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Shows the host until the user has seen enough.
pub async fn top(args: TopArgs) -> Result<u8, Failure> {
    let mut sources = Sources { arg: args.socket, sockets: Vec::new(), asked: 0 };
    let (overviews, troubles) = sources.ask().await?;
    if let Some(group) = &args.group
        && !overviews.iter().any(|overview| overview.groups.iter().any(|known| known.path == *group))
    {
        return Err(Failure::error(format!("there is no group {group:?}: ballast group ls has those that are")));
    }
    let mut screen = Screen::new(args.sort, args.group, is_utf8());
    screen.show(overviews, troubles);
    if args.batch || !can_move() {
        let width = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).unwrap_or(PAGE_WIDTH);
        let lines = screen.page(width);
        let text: String = lines.iter().map(|line| format!("{}\n", line.to_string().trim_end())).collect();
        return output::print(text);
    }
    let signals = Signals::new().map_err(|error| Failure::error(format!("signals cannot be taken: {error}")))?;
    let mut terminal = Terminal::open()?;
    let ended = follow(&mut terminal, screen, sources, signals).await;
    drop(terminal);
    ended
}

/// The terminal in its other mode; as it was before when dropped.
struct Terminal(ratatui::DefaultTerminal);

impl Terminal {
    fn open() -> Result<Self, Failure> {
        // This also makes a panic restore it.
        let terminal = ratatui::try_init();
        terminal.map(Self).map_err(|error| Failure::error(format!("the terminal cannot be used: {error}")))
    }

    fn draw(&mut self, screen: &mut Screen) -> Result<(), Failure> {
        let drawn = self.0.draw(|frame| {
            let area = frame.area();
            frame.render_widget(Paragraph::new(screen.lines(area.width, area.height)), area);
        });
        drawn.map(drop).map_err(|error| Failure::error(format!("the terminal is gone: {error}")))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Refreshes, obeys keys, and ends with the key, a signal or the terminal.
async fn follow(
    terminal: &mut Terminal,
    mut screen: Screen,
    sources: Sources,
    mut signals: Signals,
) -> Result<u8, Failure> {
    let mut keys = keys();
    let mut answers = answers(sources);
    loop {
        terminal.draw(&mut screen)?;
        tokio::select! {
            signal = signals.next() => return Ok(u8::try_from(128 + signal).unwrap_or(u8::MAX)),
            input = keys.recv() => match input {
                Some(Input::Key(key)) if key.kind != KeyEventKind::Release => {
                    if !obey(&mut screen, key) {
                        return Ok(DONE);
                    }
                }
                Some(_) => {}
                None => return Ok(DONE),
            },
            Some(answer) = answers.recv() => {
                let (overviews, troubles) = answer?;
                screen.show(overviews, troubles);
            }
        }
    }
}

/// What is typed, from a thread that waits for it and ends with the process.
fn keys() -> mpsc::UnboundedReceiver<Input> {
    let (sender, keys) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        while let Ok(input) = event::read() {
            if sender.send(input).is_err() {
                return;
            }
        }
    });
    keys
}

/// What the controllers answer, every second: keys do not wait for one that is silent.
fn answers(mut sources: Sources) -> mpsc::Receiver<Answers> {
    let (sender, answers) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut clock = tokio::time::interval_at(Instant::now() + REFRESH, REFRESH);
        // A terminal that was stopped for a while has nothing to catch up on.
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            clock.tick().await;
            if sender.send(sources.ask().await).await.is_err() {
                return;
            }
        }
    });
    answers
}

/// Does what a key says. False: that was enough.
fn obey(screen: &mut Screen, key: KeyEvent) -> bool {
    match key.code {
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('m') => screen.sort_by(Sort::Usage),
        KeyCode::Char('l') => screen.sort_by(Sort::Share),
        KeyCode::Char('p') => screen.sort_by(Sort::Pressure),
        KeyCode::Char('h') => screen.sort_by(Sort::Held),
        KeyCode::Char('b') => screen.sort_by(Sort::Balloon),
        KeyCode::Char('n') => screen.sort_by(Sort::Name),
        KeyCode::Char('r') => screen.reverse(),
        KeyCode::Char('g') => screen.next_group(),
        KeyCode::Up | KeyCode::Char('k') => screen.scroll(-1),
        KeyCode::Down | KeyCode::Char('j') => screen.scroll(1),
        KeyCode::PageUp => screen.scroll_pages(-1),
        KeyCode::PageDown | KeyCode::Char(' ') => screen.scroll_pages(1),
        KeyCode::Home => screen.scroll(isize::MIN),
        KeyCode::End => screen.scroll(isize::MAX),
        _ => {}
    }
    true
}

/// What controllers answer, and what is wrong with those that do not.
type Answers = Result<(Vec<Overview>, Vec<String>), Failure>;

/// The controllers that are asked.
struct Sources {
    arg: SocketArg,
    sockets: Vec<PathBuf>,
    asked: u32,
}

impl Sources {
    /// Asks them.
    async fn ask(&mut self) -> Answers {
        if self.asked.is_multiple_of(LOOK_AROUND) || self.sockets.is_empty() {
            self.sockets = socket::all(&self.arg)?;
        }
        self.asked = self.asked.wrapping_add(1);
        if self.sockets.is_empty() {
            return Err(socket::none_runs());
        }
        let (mut overviews, mut troubles) = (Vec::new(), Vec::new());
        for answer in client::ask_all(&self.sockets, &format!("/overview?events={EVENTS}")).await {
            match answer {
                Ok(overview) => overviews.push(overview),
                Err(failure) => troubles.push(failure.message),
            }
        }
        if overviews.is_empty() {
            // Looked for again the next time.
            self.asked = 0;
        }
        Ok((overviews, troubles))
    }
}

/// Whether there is a terminal whose cursor can be moved. One without a kind may print what is meant to move it.
fn can_move() -> bool {
    let kind = std::env::var("TERM").unwrap_or_default();
    std::io::stdout().is_terminal() && std::io::stdin().is_terminal() && !kind.is_empty() && kind != "dumb"
}

/// Whether the terminal understands more than ASCII.
fn is_utf8() -> bool {
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().filter_map(|key| std::env::var(key).ok());
    let locale = locale.into_iter().find(|value| !value.is_empty()).unwrap_or_default().to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}
