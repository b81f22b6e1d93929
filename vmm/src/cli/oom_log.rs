//! `ballast oom log`: what was decided when no memory was left, and what came of it.

use hyper::Method;
use memcg_core::units::human;

use super::{Failure, SocketArg, client, output, show, socket};
use crate::controller::events::unix_ms;
use crate::controller::oom_log::{DecisionView, OomLogView, Outcome, Reason};
use crate::controller::shortage::ShortageSign;

/// `ballast oom log`.
#[derive(Debug, clap::Args)]
pub struct LogArgs {
    /// Only decisions after this number
    #[arg(long, value_name = "N", default_value_t = 0)]
    since: u64,
    /// As JSON, with the list that each was taken from
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Shows the decisions, the newest last.
pub async fn log(args: LogArgs) -> Result<u8, Failure> {
    let socket = socket::the_only(&args.socket)?;
    let target = format!("/oom/log?since={}", args.since);
    let (_, body) = client::request(&socket, Method::GET, &target, String::new()).await?;
    let view: OomLogView = client::decode(&body)?;
    if args.json { output::json(&view) } else { output::print(table(&view, unix_ms())) }
}

/// The table as it is at `now_ms`.
fn table(view: &OomLogView, now_ms: u64) -> String {
    let dropped = match view.dropped {
        0 => String::new(),
        dropped => format!("{dropped} earlier decisions are no longer known\n"),
    };
    if view.decisions.is_empty() {
        return format!("{dropped}nothing had to be decided\n");
    }
    let header = ["#", "AGO", "LEVEL", "SHORT OF MEMORY", "WHO", "ACTION", "BY", "NOW", "FREED", "TOOK"];
    let rows = view.decisions.iter().map(|decision| row(decision, now_ms));
    let rows: Vec<_> = [header.map(str::to_owned)].into_iter().chain(rows).collect();
    let columns = show::columns(&rows, 8);
    let why = std::iter::once("WHY".to_owned()).chain(view.decisions.iter().map(why));
    let lines = columns.lines().zip(why).map(|(line, why)| format!("{line}  {why}\n"));
    dropped + &lines.collect::<String>()
}

fn row(decision: &DecisionView, now_ms: u64) -> [String; 10] {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        decision.number.to_string(),
        show::age(now_ms.saturating_sub(decision.time_ms)),
        // A VM's path looks like that of a group.
        if decision.reason == Reason::Limit { "its own".to_owned() } else { decision.level.clone() },
        shortage(decision),
        or_none(decision.vm.clone()),
        or_none(decision.action.map(|action| action.word().to_owned())),
        decision.by.word().to_owned(),
        outcome(decision.outcome).to_owned(),
        or_none(decision.action.map(|_| human(decision.freed_bytes))),
        or_none(decision.took_ms.map(took)),
    ]
}

/// Why it was this one, and what came of asking somebody else.
fn why(decision: &DecisionView) -> String {
    decision.in_vain.iter().fold(decision.why.clone(), |why, in_vain| format!("{why}; {in_vain}"))
}

/// How the level was seen to be without memory.
pub fn shortage(decision: &DecisionView) -> String {
    match (decision.short, decision.available_bytes) {
        (Some(ShortageSign::Available), Some(available)) => format!("{} available", human(available)),
        (Some(ShortageSign::Stalled), Some(available)) => format!("stalled, {} available", human(available)),
        _ => {
            let thrashing = if decision.reason == Reason::Thrash { "thrashing, " } else { "" };
            format!("{thrashing}{} of {}", human(decision.usage_bytes), show::limit(decision.max_bytes))
        }
    }
}

/// What has come of it, in a word or two.
fn outcome(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::UnderWay => "under way",
        Outcome::Freed => "freed",
        Outcome::Late => "late",
        Outcome::Nothing => "nothing",
        Outcome::Waits => "waits",
        Outcome::Failed => "failed",
        Outcome::Resumed => "resumed",
        Outcome::Nobody => "nobody",
    }
}

/// A time in a unit in which it has few digits.
fn took(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms}ms"),
        ms => format!("{:.1}s", ms as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::oom_log::DecidedBy;
    use crate::controller::view::OomAction;

    fn decision(number: u64, vm: Option<&str>, outcome: Outcome) -> DecisionView {
        DecisionView {
            number,
            time_ms: 1_000_000 - number * 20_000,
            event: 0,
            level: "/gold".to_owned(),
            reason: Reason::Full,
            usage_bytes: 256 << 20,
            max_bytes: Some(256 << 20),
            short: None,
            available_bytes: None,
            vm: vm.map(str::to_owned),
            id: vm.map(|_| 3),
            action: vm.map(|_| OomAction::Kill),
            by: DecidedBy::Policy,
            in_vain: None,
            why: "because".to_owned(),
            ranked: Vec::new(),
            not_shown: 0,
            expected_bytes: 8 << 20,
            freed_bytes: 8 << 20,
            took_ms: vm.map(|_| 40),
            outcome,
            outcome_ms: 0,
        }
    }

    #[test]
    fn a_decision_is_a_line_that_says_why() {
        let host = DecisionView {
            level: "/".to_owned(),
            reason: Reason::Host,
            short: Some(ShortageSign::Available),
            available_bytes: Some(30 << 20),
            took_ms: Some(2_340),
            action: Some(OomAction::Pause),
            ..decision(1, Some("web"), Outcome::Freed)
        };
        let thrashing = DecisionView { reason: Reason::Thrash, ..decision(3, Some("db"), Outcome::UnderWay) };
        let in_vain = Some("the hook was asked in vain: it said \"\"".to_owned());
        let nobody = DecisionView { in_vain, ..decision(2, None, Outcome::Nobody) };
        let decisions = vec![host, nobody, thrashing];
        let view = OomLogView { dropped: 0, decisions };
        let expected = "\
            #  AGO  LEVEL  SHORT OF MEMORY          WHO  ACTION  BY      NOW        FREED  TOOK  WHY\n\
            1  20s  /      30M available            web  pause   policy  freed         8M  2.3s  because\n\
            2  40s  /gold  256M of 256M             -    -       policy  nobody         -     -  because; the hook was asked in vain: it said \"\"\n\
            3  60s  /gold  thrashing, 256M of 256M  db   kill    policy  under way     8M  40ms  because\n";
        assert_eq!(table(&view, 1_000_000), expected);
        let none = OomLogView { dropped: 7, decisions: Vec::new() };
        assert_eq!(table(&none, 0), "7 earlier decisions are no longer known\nnothing had to be decided\n");
    }
}
