//! Pictures: memory over time while a guest's limit is lowered, and what a first touch costs by the pages that one fault
//! fills.

use std::error::Error;
use std::path::Path;

use ballast_tests::cold::{self, Moment, Story, Tempo};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::bare::{self, Handler, Place};
use crate::{MIB, full, median, vm};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Result<T> = std::result::Result<T, Box<dyn Error>>;
type Points = Vec<(f64, f64)>;

const WIDTH: u32 = 960;
/// Where the legend begins, right of the axes.
const LEGEND: i32 = 740;
/// Room for the numbers of an axis and what they are.
const Y_LABELS: u32 = 65;

/// Colours that are told apart also by who sees few: Okabe and Ito's.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const RED: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const PURPLE: RGBColor = RGBColor(204, 121, 167);
const ORANGE: RGBColor = RGBColor(230, 159, 0);
const GREY: RGBColor = RGBColor(215, 215, 215);
const LIGHT_GREEN: RGBColor = RGBColor(190, 229, 218);

/// A line: what it is, its colour, and where it goes.
type Line = (&'static str, RGBColor, Points);

/// Draws both into a directory, and prints where they are.
pub fn draw(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join("cold.svg");
    over_time(&path, &cold::play(Tempo::DRAWN, |_| {}))?;
    println!("{}", path.display());
    let path = directory.join("granule.svg");
    by_granule(&path)?;
    println!("{}", path.display());
    Ok(())
}

/// A white picture with what is seen on it written above.
fn picture<'a>(path: &'a Path, height: u32, title: &str) -> Result<Area<'a>> {
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    Ok(root.titled(title, ("sans-serif", 20))?)
}

/// What the colours are, from `top` on: of lines, and then of fields.
fn legend(area: &Area<'_>, top: i32, lines: &[(&str, RGBColor)], fields: &[(&str, RGBColor)]) -> Result<()> {
    for (row, (name, colour)) in lines.iter().chain(fields).enumerate() {
        let (x, y) = (45, top + 24 * row as i32);
        let half = if row < lines.len() { 1 } else { 7 };
        area.draw(&Rectangle::new([(x - 35, y + 7 - half), (x - 8, y + 7 + half)], colour.filled()))?;
        area.draw(&Text::new(*name, (x, y), ("sans-serif", 14)))?;
    }
    Ok(())
}

/// Usage, limit, working set, balloon and swap; below that the speed of the guest's accesses.
fn over_time(path: &Path, story: &Story) -> Result<()> {
    let title = format!(
        "The limit of a guest that uses {} MiB of its {} is lowered to {} MiB",
        cold::HOT / MIB,
        (cold::HOT + cold::COLD) / MIB,
        cold::LOW_MAX / MIB
    );
    let root = picture(path, 640, &title)?;
    let (axes, right) = root.split_horizontally(LEGEND);
    let (upper, lower) = axes.split_vertically(410);
    // At the end it reads all of its memory once, to see that it is whole: that is another story.
    let end = story.periods.last().map_or(0.0, |period| period.ms);
    let moments: Vec<Moment> = story.moments.iter().copied().filter(|moment| moment.ms <= end).collect();
    let lines = memory(&moments);
    let names: Vec<_> = lines.iter().map(|(name, colour, _)| (*name, *colour)).collect();
    time_chart(&upper, story, "MiB", lines, Some(&off_by(&moments)))?;
    let [before, ..] = story.cycles();
    let speed = story.periods.iter().map(|p| (p.ms / 1000.0, before / p.cycles)).collect();
    time_chart(&lower, story, "speed (before = 1)", vec![("", BLUE, speed)], None)?;
    let fields = [("its error (95 of 100)", LIGHT_GREEN), ("until the limit is in force", GREY)];
    legend(&right, 90, &names, &fields)?;
    legend(&right, 470, &[("the guest's accesses", BLUE)], &[])?;
    root.present()?;
    Ok(())
}

fn memory(moments: &[Moment]) -> Vec<Line> {
    let known = |of: fn(&Moment) -> Option<u64>| {
        moments.iter().filter_map(move |m| Some((m.ms / 1000.0, of(m)? as f64 / MIB as f64))).collect::<Points>()
    };
    vec![
        ("limit (memory.max)", RED, known(|m| Some(m.limit))),
        ("usage, with the store", BLUE, known(|m| Some(m.usage))),
        ("swapped", PURPLE, known(|m| Some(m.swapped))),
        ("store: swapped, compressed", ORANGE, known(|m| Some(m.store))),
        ("balloon (it has none)", BLACK, known(|m| Some(m.balloon))),
        ("working set, estimated", GREEN, known(|m| Some(m.working_set?.0))),
    ]
}

/// Around the estimate of the working set, where it may be.
fn off_by(moments: &[Moment]) -> Points {
    let known = moments.iter().filter_map(|m| Some((m.ms / 1000.0, m.working_set?)));
    let side = |sign: f64| known.clone().map(move |(s, (set, off))| (s, (set as f64 + sign * off as f64) / MIB as f64));
    side(1.0).chain(side(-1.0).rev()).collect()
}

/// Lines over the story's time, above those that have a field; the time in which the limit was lowered is grey.
fn time_chart(area: &Area<'_>, story: &Story, what: &str, lines: Vec<Line>, field: Option<&Points>) -> Result<()> {
    let last = field.is_none();
    let end = story.periods.last().map_or(1.0, |period| period.ms / 1000.0);
    let values = lines.iter().flat_map(|(_, _, points)| points);
    let top = values.map(|point| point.1).fold(1.0, f64::max) * 1.08;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .x_label_area_size(if last { 45 } else { 25 })
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    let (from, to) = (story.lowered.0 / 1000.0, story.lowered.1 / 1000.0);
    chart.draw_series([Rectangle::new([(from, 0.0), (to, top)], GREY.filled())])?;
    chart.draw_series(field.map(|field| Polygon::new(field.as_slice(), LIGHT_GREEN)))?;
    let digits = usize::from(last);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .x_desc(if last { "time in seconds" } else { "" })
        .y_desc(what)
        .x_label_formatter(&|seconds| format!("{seconds:.0}"))
        .y_label_formatter(&|value| format!("{value:.digits$}"))
        .y_labels(if last { 6 } else { 10 })
        .draw()?;
    for (_, colour, points) in lines {
        chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
    }
    Ok(())
}

/// What is touched, and its pages.
const WORK: &str = "touch 16M 64M seed=1";
const PAGES: f64 = (64 * MIB / 4096) as f64;

/// Microseconds for each page that is touched for the first time, by the pages that one fault fills; and what it costs when
/// the kernel does it, page by page or with huge pages, and when we do.
fn by_granule(path: &Path) -> Result<()> {
    let middle = |run: &dyn Fn() -> u64| {
        let runs = (0..full(3, 7)).map(|_| {
            bare::warm(4 * 64 * MIB);
            run() as f64
        });
        median(runs) / 1000.0 / PAGES
    };
    let measured = |handler| middle(&|| bare::ns(handler, Place::Ours, 1, WORK));
    let granules: Vec<u64> = (0..12).map(|log| 1 << log).collect();
    let points: Points = granules.iter().map(|pages| (*pages as f64, measured(Handler::Granule(*pages)))).collect();
    let level = |us| vec![(1.0, us), (2048.0, us)];
    let lines: [Line; 4] = [
        ("the kernel, 4 KiB pages", RED, level(measured(Handler::Small))),
        ("the kernel, 2 MiB pages", GREEN, level(measured(Handler::Huge))),
        ("a charged VM of ballast", PURPLE, level(middle(&|| vm::run("size=320M,max=320M", 1, WORK).ns))),
        ("a thread that fills so many", BLUE, points),
    ];
    let values = || lines.iter().flat_map(|line| &line.2).map(|point| point.1);
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    let root = picture(path, 560, "What the first touch of a page costs a guest, by the pages that one fault fills")?;
    let (axes, right) = root.split_horizontally(LEGEND);
    let mut chart = ChartBuilder::on(&axes)
        .margin(10)
        .x_label_area_size(45)
        .y_label_area_size(Y_LABELS)
        .build_cartesian_2d((1.0..2048.0).log_scale().base(2.0), (least / 1.2..most * 1.2).log_scale().base(2.0))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .x_desc("4 KiB pages that one fault fills")
        .y_desc("µs for each page")
        .x_labels(12)
        .y_labels(8)
        .x_label_formatter(&|pages| format!("{pages:.0}"))
        .y_label_formatter(&|us| format!("{us}"))
        .draw()?;
    let names: Vec<_> = lines.iter().map(|(name, colour, _)| (*name, *colour)).collect();
    for (_, colour, points) in lines {
        // A line between two points is a level, and has no points to show.
        let size = if points.len() > 2 { 3 } else { 0 };
        chart.draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(size))?;
    }
    legend(&right, 90, &names, &[])?;
    root.present()?;
    Ok(())
}
