//! What `top` shows: pure, from what the controllers have answered and what was typed to lines of text.
//!
//! ```text
//!  ballast: 3 VMs, 1 held               host 18.2G of 24G available      what there is
//!  /  [||||||||||          ]  1.2G of 4G, 30%   pressure 0.00 0.00       all of them together, or the group
//!  NAME      STATE     USED    MAX  USAGE              %   BALLOON …      as many columns as fit
//!  web       running   412M   512M  [||||||||||  ]    80   12M/16M
//!  …                                                                     scrolls
//!  ───────────────────────────────────────── 1-12 of 200 ──────────
//!  12:30:01 web  max_hit …                                              the newest events, the newest last
//!  q quit  m usage  p pressure …                                        keys
//! ```
//!
//! Columns that do not fit are left out, the least important first; names are cut last. What is told by the colour is
//! told by a word as well.

use memcg_core::units::human;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use crate::cli::show::share;
use crate::cli::{show, verbs};
use crate::controller::events::Event;
use crate::controller::overview::Overview;
use crate::controller::view::{GroupView, VmView};

/// What the list is sorted by; the most comes first, but for names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sort {
    /// Memory charged
    Usage,
    /// Memory charged as a share of the limit
    Share,
    /// Time that vCPUs waited for memory, of the last 10 s
    Pressure,
    /// Time that vCPUs were held, in all
    Held,
    /// Memory in the balloon
    Balloon,
    /// Name
    Name,
}

/// One column of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Name,
    Group,
    State,
    Used,
    Max,
    Bar,
    Share,
    Balloon,
    Swap,
    Pressure,
    Held,
}

/// All columns from left to right: heading, width, and how soon each is left out (0: never).
const COLUMNS: [(Column, &str, usize, u8); 11] = [
    (Column::Name, "NAME", 8, 0),
    (Column::Group, "GROUP", 8, 10),
    (Column::State, "STATE", 8, 3),
    (Column::Used, "USED", 7, 0),
    (Column::Max, "MAX", 7, 2),
    (Column::Bar, "USAGE", 10, 5),
    (Column::Share, "%", 4, 1),
    (Column::Balloon, "BALLOON", 13, 7),
    (Column::Swap, "SWAP", 5, 8),
    (Column::Pressure, "PRESS", 6, 4),
    (Column::Held, "HELD", 7, 9),
];

/// The widest that a name, a group and a bar get.
const WIDEST: [usize; 3] = [32, 24, 40];

/// Lines of events at most.
const MOST_EVENTS: usize = 5;

/// Lines that a terminal needs for any events to be shown.
const EVENTS_FROM: u16 = 14;

/// What is known, and how it is looked at.
#[derive(Debug)]
pub struct Screen {
    vms: Vec<VmView>,
    events: Vec<Event>,
    troubles: Vec<String>,
    /// Free and total memory of the host.
    host: (u64, u64),
    groups: Vec<GroupView>,
    /// There are several controllers.
    several: bool,
    sort: Sort,
    reversed: bool,
    group: Option<String>,
    offset: usize,
    /// Rows that were shown the last time.
    rows: usize,
    utf8: bool,
}

impl Screen {
    /// An empty one. `utf8`: the terminal knows more than ASCII.
    pub fn new(sort: Sort, group: Option<String>, utf8: bool) -> Self {
        Self {
            vms: Vec::new(),
            events: Vec::new(),
            troubles: Vec::new(),
            host: (0, 0),
            groups: Vec::new(),
            several: false,
            sort,
            reversed: false,
            group,
            offset: 0,
            rows: 0,
            utf8,
        }
    }

    /// Takes new answers in. Without any, the last ones stay.
    pub fn show(&mut self, overviews: Vec<Overview>, troubles: Vec<String>) {
        self.troubles = troubles;
        let Some(first) = overviews.first() else { return };
        self.host = (first.host.available_bytes, first.host.total_bytes);
        // Groups of one path under several controllers are not one group.
        self.several = overviews.len() > 1;
        self.groups.clear();
        self.vms.clear();
        self.events.clear();
        for overview in overviews {
            self.vms.extend(overview.vms);
            self.groups.extend(overview.groups);
            self.events.extend(overview.events);
        }
        if self.several {
            self.events.sort_by_key(|event| (event.time_ms, event.seq));
        }
        self.arrange();
    }

    /// Sorts by something else, or the other way round if by that already.
    pub fn sort_by(&mut self, sort: Sort) {
        self.reversed = self.sort == sort && !self.reversed;
        self.sort = sort;
        self.offset = 0;
        self.arrange();
    }

    /// Sorts the other way round.
    pub fn reverse(&mut self) {
        self.reversed = !self.reversed;
        self.arrange();
    }

    /// Shows only the next of the groups, and after the last one all of them.
    pub fn next_group(&mut self) {
        let mut groups: Vec<_> = self.vms.iter().map(group_of).filter(|group| *group != "/").collect();
        groups.sort_unstable();
        groups.dedup();
        let after = |group: &&&str| self.group.as_deref().is_none_or(|shown| **group > shown);
        self.group = groups.iter().find(after).map(|group| (*group).to_owned());
        self.offset = 0;
    }

    /// Scrolls by so many rows.
    pub fn scroll(&mut self, rows: isize) {
        self.offset = self.offset.saturating_add_signed(rows);
        self.bound();
    }

    /// Scrolls by so many pages.
    pub fn scroll_pages(&mut self, pages: isize) {
        self.scroll(pages.saturating_mul(isize::try_from(self.rows.max(1)).unwrap_or(isize::MAX)));
    }

    fn bound(&mut self) {
        let most = self.shown().count().saturating_sub(self.rows.max(1));
        self.offset = self.offset.min(most);
    }

    fn arrange(&mut self) {
        let sort = self.sort;
        let key = |vm: &VmView| match sort {
            Sort::Usage => vm.memory.current_bytes as f64,
            Sort::Share => share(vm).unwrap_or(-1.0),
            Sort::Pressure => vm.pressure.some.avg10,
            Sort::Held => vm.held.total_us as f64,
            Sort::Balloon => vm.balloon.actual_bytes as f64,
            Sort::Name => 0.0,
        };
        self.vms.sort_by(|a, b| key(b).total_cmp(&key(a)).then_with(|| a.name.cmp(&b.name)));
        if self.reversed {
            self.vms.reverse();
        }
        self.bound();
    }

    /// The VMs that are shown.
    fn shown(&self) -> impl Iterator<Item = &VmView> {
        self.vms.iter().filter(|vm| self.group.as_deref().is_none_or(|group| is_in(group_of(vm), group)))
    }

    /// The lines for a terminal of this size.
    pub fn lines(&mut self, width: u16, height: u16) -> Vec<Line<'static>> {
        let (width, height) = (usize::from(width), usize::from(height));
        let mut lines = self.head(width);
        let events = if height < usize::from(EVENTS_FROM) { 0 } else { MOST_EVENTS.min(height / 5) };
        let events = events.min(self.events.len());
        // The heading of the list, the rule and the keys.
        let rows = height.saturating_sub(lines.len() + events + 3).max(1);
        self.rows = rows;
        self.bound();
        let columns = self.columns(width);
        lines.push(self.heading(&columns, width));
        let count = self.shown().count();
        let listed: Vec<_> = self.shown().skip(self.offset).take(rows).map(|vm| self.row(vm, &columns)).collect();
        let last = self.offset + listed.len();
        lines.extend(listed);
        if count == 0 {
            lines.push(Line::from(self.cut(self.nobody(), width)));
        }
        lines.resize(height.saturating_sub(events + 2), Line::default());
        let place = if count > rows { format!(" {}-{last} of {count} ", self.offset + 1) } else { String::new() };
        lines.push(self.rule(&place, width));
        let newest = self.events.len().saturating_sub(events);
        let below: Vec<_> = self.events[newest..].iter().map(|event| self.event(event, width)).collect();
        lines.extend(below);
        lines.push(self.keys(width));
        lines.truncate(height);
        lines.into_iter().map(|line| clipped(line, width)).collect()
    }

    /// Everything on one page, as long as it is.
    pub fn page(&mut self, width: u16) -> Vec<Line<'static>> {
        let width = usize::from(width);
        let mut lines = self.head(width);
        let columns = self.columns(width);
        lines.push(self.heading(&columns, width));
        lines.extend(self.shown().map(|vm| self.row(vm, &columns)));
        if self.shown().next().is_none() {
            lines.push(Line::from(self.nobody()));
        }
        lines
    }

    fn nobody(&self) -> String {
        match &self.group {
            Some(group) => format!("There is no VM in {group}; g shows the next group."),
            None => "There is no VM yet: `ballast create NAME --kernel FILE --memory size=1G` makes one.".to_owned(),
        }
    }

    /// What there is, and all of it together.
    fn head(&self, width: usize) -> Vec<Line<'static>> {
        let state = |wanted: &str| self.shown().filter(|vm| show::state(vm) == wanted).count();
        let mut what = match self.shown().count() {
            1 => "1 VM".to_owned(),
            count => format!("{count} VMs"),
        };
        for name in ["starting", "held", "paused", "ended"] {
            match state(name) {
                0 => {}
                count => what.push_str(&format!(", {count} {name}")),
            }
        }
        let (free, total) = self.host;
        let host = format!("host {} of {} available", human(free), human(total));
        let left = format!("ballast: {what}");
        let gap = width.saturating_sub(left.chars().count() + host.chars().count());
        let first = if gap >= 2 { format!("{left}{}{host}", " ".repeat(gap)) } else { self.cut(left, width) };
        let mut lines = vec![Line::from(Span::styled(first, Modifier::BOLD))];
        lines.push(self.totals(width));
        for trouble in &self.troubles {
            lines.push(Line::from(Span::styled(self.cut(trouble.clone(), width), Color::Red)));
        }
        lines
    }

    /// All that is shown, together.
    fn totals(&self, width: usize) -> Line<'static> {
        let path = self.group.as_deref().unwrap_or("/");
        let same: Vec<_> = self.groups.iter().filter(|group| group.path == path).collect();
        let current = same.iter().map(|group| group.memory.current_bytes).sum();
        let only = same.first().filter(|_| !self.several);
        let max = only.and_then(|group| group.memory.max_bytes);
        let share = max.filter(|max| *max > 0).map(|max| current as f64 / max as f64);
        let mut text = match max {
            Some(max) => format!(" {} of {}", human(current), human(max)),
            None => format!(" {} in use, no limit", human(current)),
        };
        if let Some(share) = share {
            text.push_str(&format!(", {:.0}%", share * 100.0));
        }
        if let Some(pressure) = only.map(|group| group.pressure) {
            text.push_str(&format!("   pressure some {:.2} full {:.2}", pressure.some.avg10, pressure.full.avg10));
        }
        let beside = path.chars().count() + text.chars().count() + 1;
        let bar = width.saturating_sub(beside).min(WIDEST[2]);
        let mut spans = vec![Span::raw(self.cut(format!("{path} "), width))];
        if bar >= 8 && share.is_some() {
            spans.push(bar_of(share, bar, false));
        }
        spans.push(Span::raw(self.cut(text, width.saturating_sub(path.chars().count() + 1))));
        Line::from(spans)
    }

    /// The columns that fit, with their widths.
    fn columns(&self, width: usize) -> Vec<(Column, &'static str, usize)> {
        let longest = |of: fn(&VmView) -> &str| self.shown().map(|vm| of(vm).chars().count()).max().unwrap_or(0);
        let [name, group] = [longest(|vm| &vm.name), longest(group_of)];
        let mut columns: Vec<_> = COLUMNS.to_vec();
        // A column in which nothing is said.
        columns.retain(|(column, ..)| match column {
            Column::Group => self.shown().any(|vm| group_of(vm) != "/"),
            Column::Swap => {
                self.shown().any(|vm| vm.swap.current_bytes > 0 || vm.swap.max_bytes.is_some_and(|max| max > 0))
            }
            _ => true,
        });
        let needs = |columns: &[(Column, &str, usize, u8)]| {
            columns.iter().map(|(_, _, width, _)| width + 1).sum::<usize>().saturating_sub(1)
        };
        while needs(&columns) > width
            && let Some(least) = columns.iter().map(|(.., soon)| *soon).max().filter(|soon| *soon > 0)
        {
            columns.retain(|(.., soon)| *soon != least);
        }
        let mut rest = width.saturating_sub(needs(&columns));
        // What is left goes to the names first, then to the bar.
        for (wanted, least, most) in
            [(Column::Name, name, WIDEST[0]), (Column::Group, group, WIDEST[1]), (Column::Bar, usize::MAX, WIDEST[2])]
        {
            for (column, _, width, _) in columns.iter_mut().filter(|(column, ..)| *column == wanted) {
                debug_assert_eq!(*column, wanted);
                let more = least.min(most).saturating_sub(*width).min(rest);
                *width += more;
                rest -= more;
            }
        }
        columns.into_iter().map(|(column, heading, width, _)| (column, heading, width)).collect()
    }

    fn heading(&self, columns: &[(Column, &'static str, usize)], width: usize) -> Line<'static> {
        let sorted = match self.sort {
            Sort::Usage => Column::Used,
            Sort::Share => Column::Share,
            Sort::Pressure => Column::Pressure,
            Sort::Held => Column::Held,
            Sort::Balloon => Column::Balloon,
            Sort::Name => Column::Name,
        };
        let mut spans = Vec::new();
        let mut used = 0;
        for (column, heading, width) in columns {
            let mut style = Style::from(Modifier::REVERSED);
            if *column == sorted {
                style = style.add_modifier(Modifier::BOLD | Modifier::UNDERLINED);
            }
            let text = aligned(*column, heading, *width);
            used += text.chars().count() + 1;
            spans.push(Span::styled(text, style));
            spans.push(Span::styled(" ", Modifier::REVERSED));
        }
        spans.push(Span::styled(" ".repeat(width.saturating_sub(used)), Modifier::REVERSED));
        clipped(Line::from(spans), width)
    }

    fn row(&self, vm: &VmView, columns: &[(Column, &'static str, usize)]) -> Line<'static> {
        let mut spans = Vec::new();
        for (column, _, width) in columns {
            spans.push(self.cell(vm, *column, *width));
            spans.push(Span::raw(" "));
        }
        spans.pop();
        Line::from(spans)
    }

    fn cell(&self, vm: &VmView, column: Column, width: usize) -> Span<'static> {
        let charged = |bytes: u64| if vm.accounting { human(bytes) } else { "-".to_owned() };
        let state = show::state(vm);
        let text = match column {
            Column::Name => self.cut(vm.name.clone(), width),
            Column::Group => self.cut(group_of(vm).to_owned(), width),
            Column::State if vm.stale => format!("{state}?"),
            Column::State => state.to_owned(),
            Column::Used => charged(vm.memory.current_bytes),
            Column::Max => match (vm.memory.max_pending_bytes, vm.memory.max_bytes) {
                // On its way there.
                (Some(pending), _) => format!(">{}", human(pending)),
                (None, Some(max)) => human(max),
                (None, None) => "max".to_owned(),
            },
            Column::Bar => return bar_of(share(vm), width, vm.held.now),
            Column::Share => share(vm).map_or("-".to_owned(), |share| format!("{:.0}", share * 100.0)),
            Column::Balloon if !vm.balloon.ready && vm.balloon.actual_bytes == 0 => "-".to_owned(),
            Column::Balloon => format!("{}/{}", human(vm.balloon.actual_bytes), human(vm.balloon.target_bytes)),
            Column::Swap => human(vm.swap.current_bytes),
            Column::Pressure => format!("{:.2}", vm.pressure.some.avg10),
            Column::Held => seconds(vm.held.total_us),
        };
        let style = match (column, state) {
            (Column::State, "held") => Style::from(Color::Red),
            (Column::State, "paused" | "starting") => Style::from(Color::Yellow),
            (_, "ended") => Style::from(Modifier::DIM),
            (Column::Pressure, _) if vm.pressure.some.avg10 >= 10.0 => Style::from(Color::Red),
            (Column::Pressure, _) if vm.pressure.some.avg10 >= 1.0 => Style::from(Color::Yellow),
            _ => Style::default(),
        };
        Span::styled(aligned(column, &text, width), style)
    }

    fn rule(&self, place: &str, width: usize) -> Line<'static> {
        let line = if self.utf8 { "─" } else { "-" };
        let left = width.saturating_sub(place.chars().count());
        let right = left.min(4);
        let text = format!("{}{place}{}", line.repeat(left - right), line.repeat(right));
        Line::from(Span::styled(self.cut(text, width), Modifier::DIM))
    }

    fn event(&self, event: &Event, width: usize) -> Line<'static> {
        let text = verbs::event_line(event);
        // The number is of no use to somebody who only looks.
        let text = text.trim_start().split_once(' ').map_or(text.as_str(), |(_, rest)| rest);
        Line::from(self.cut(text.trim_end().to_owned(), width))
    }

    fn keys(&self, width: usize) -> Line<'static> {
        let group = match &self.group {
            Some(group) => format!("g group: {group}"),
            None => "g group".to_owned(),
        };
        let text = format!("q quit  sort: m usage  l share  p pressure  h held  b balloon  n name  r reverse  {group}");
        let short = format!("q quit  m usage  p pressure  n name  {group}");
        let text = if text.chars().count() <= width { text } else { short };
        Line::from(Span::styled(self.cut(text, width), Modifier::DIM))
    }

    /// The text, its end cut off with a sign of it when it is too long.
    fn cut(&self, text: String, width: usize) -> String {
        if text.chars().count() <= width {
            return text;
        }
        let sign = if self.utf8 { '…' } else { '~' };
        text.chars().take(width.saturating_sub(1)).chain((width > 0).then_some(sign)).collect()
    }
}

/// The line without what does not fit.
fn clipped(line: Line<'static>, width: usize) -> Line<'static> {
    let mut left = width;
    let spans = line.spans.into_iter().map(|span| {
        let text: String = span.content.chars().take(left).collect();
        left -= text.chars().count();
        Span::styled(text, span.style)
    });
    Line::from(spans.collect::<Vec<_>>())
}

/// Path of the group that a VM is in.
fn group_of(vm: &VmView) -> &str {
    &vm.group
}

/// Whether `group` is `top` or in it.
fn is_in(group: &str, top: &str) -> bool {
    top == "/" || group.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// A bar of exactly `width`, its brackets included.
fn bar_of(share: Option<f64>, width: usize, held: bool) -> Span<'static> {
    let share = share.unwrap_or(0.0).clamp(0.0, 1.0);
    let inner = width.saturating_sub(2);
    let filled = ((inner as f64 * share).round() as usize).min(inner);
    let colour = match share {
        _ if held => Color::Red,
        share if share >= 0.95 => Color::Red,
        share if share >= 0.8 => Color::Yellow,
        _ => Color::Green,
    };
    Span::styled(format!("[{}{}]", "|".repeat(filled), " ".repeat(inner - filled)), colour)
}

/// A time in at most seven characters.
fn seconds(us: u64) -> String {
    match us {
        0 => "0".to_owned(),
        us if us < 100_000_000 => format!("{:.1}s", us as f64 / 1e6),
        us if us < 6_000_000_000 => format!("{}m{:02}s", us / 60_000_000, us / 1_000_000 % 60),
        us => format!("{}h{:02}m", us / 3_600_000_000, us / 60_000_000 % 60),
    }
}

/// Words begin where their column does, numbers end where it does.
fn aligned(column: Column, text: &str, width: usize) -> String {
    match column {
        Column::Name | Column::Group | Column::State | Column::Bar => format!("{text:width$}"),
        _ => format!("{text:>width$}"),
    }
}

#[cfg(test)]
mod tests;
