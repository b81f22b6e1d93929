//! Pictures: memory over time while a guest's limit is lowered, and what a first touch costs by the pages that one fault
//! fills.

use std::error::Error;
use std::path::Path;

use ballast_tests::cold::{self, Moment, Story};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::bare::{self, Handler, Place};
use crate::{MIB, full, median};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Result<T> = std::result::Result<T, Box<dyn Error>>;

const SIZE: (u32, u32) = (960, 640);

/// Colours that are told apart also by who sees few: Okabe and Ito's.
const BLUE: RGBColor = RGBColor(0, 114, 178);
const RED: RGBColor = RGBColor(213, 94, 0);
const GREEN: RGBColor = RGBColor(0, 158, 115);
const PURPLE: RGBColor = RGBColor(204, 121, 167);
const ORANGE: RGBColor = RGBColor(230, 159, 0);

/// Draws both into a directory, and prints where they are.
pub fn draw(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let path = directory.join("cold.svg");
    over_time(&path, &cold::play(|_| {}))?;
    println!("{}", path.display());
    let path = directory.join("granule.svg");
    by_granule(&path)?;
    println!("{}", path.display());
    Ok(())
}

/// Usage, limit, working set, balloon and swap; below that the speed of the guest's accesses.
fn over_time(path: &Path, story: &Story) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (upper, lower) = root.split_vertically(440);
    let end = story.moments.last().map_or(1.0, |moment| moment.ms / 1000.0);
    memory(&upper, &story.moments, end)?;
    speed(&lower, story, end)?;
    root.present()?;
    Ok(())
}

fn memory(area: &Area<'_>, moments: &[Moment], end: f64) -> Result<()> {
    let mib = |bytes: u64| bytes as f64 / MIB as f64;
    let top = moments.iter().map(|m| mib(m.usage.max(m.limit).max(m.swapped))).fold(1.0, f64::max) * 1.05;
    let caption = format!(
        "A guest that uses {} MiB of {}: its limit is lowered to {}",
        cold::HOT / MIB,
        (cold::HOT + cold::COLD) / MIB,
        cold::LOW_MAX / MIB
    );
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 20))
        .margin(10)
        .margin_right(25)
        .x_label_area_size(10)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .y_desc("MiB")
        .y_label_formatter(&|mib| format!("{mib:.0}"))
        .x_labels(0)
        .draw()?;
    let known = |of: fn(&Moment) -> Option<u64>| {
        moments.iter().filter_map(move |m| Some((m.ms / 1000.0, mib(of(m)?)))).collect::<Vec<_>>()
    };
    let lines = [
        ("limit", RED, known(|m| Some(m.limit))),
        ("usage", BLUE, known(|m| Some(m.usage))),
        ("working set, estimated", GREEN, known(|m| m.working_set)),
        ("swapped", PURPLE, known(|m| Some(m.swapped))),
        ("its store", ORANGE, known(|m| Some(m.store))),
        ("balloon", BLACK, known(|m| Some(m.balloon))),
    ];
    for (name, colour, points) in lines {
        let style = colour.stroke_width(2);
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

fn speed(area: &Area<'_>, story: &Story, end: f64) -> Result<()> {
    let [before, ..] = story.cycles();
    let points: Vec<(f64, f64)> = story.periods.iter().map(|p| (p.ms / 1000.0, before / p.cycles)).collect();
    let top = points.iter().map(|point| point.1).fold(1.0, f64::max) * 1.1;
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .margin_right(25)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_desc("seconds")
        .y_desc("speed")
        .x_label_formatter(&|seconds| format!("{seconds:.0}"))
        .y_labels(5)
        .draw()?;
    chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2)))?;
    Ok(())
}

/// Microseconds for each page that is touched for the first time, by the pages that one fault fills; and what it costs when
/// the kernel does it, page by page or with huge pages.
fn by_granule(path: &Path) -> Result<()> {
    const PAGES: f64 = (64 * MIB / 4096) as f64;
    let measured = |handler| {
        let runs = (0..full(3, 7)).map(|_| bare::ns(handler, Place::Ours, 1, "touch 16M 64M seed=1") as f64);
        median(runs) / 1000.0 / PAGES
    };
    let granules: Vec<u64> = (0..12).map(|log| 1 << log).collect();
    let points: Vec<(f64, f64)> =
        granules.iter().map(|pages| (*pages as f64, measured(Handler::Granule(*pages)))).collect();
    let kernel = [
        ("the kernel, 4 KiB pages", RED, measured(Handler::Small)),
        ("the kernel, huge pages", GREEN, measured(Handler::Huge)),
    ];
    let values = || points.iter().map(|point| point.1).chain(kernel.iter().map(|line| line.2));
    let (least, most) = (values().fold(f64::MAX, f64::min), values().fold(0.0, f64::max));
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("First touch of a page, by the pages that one fault fills", ("sans-serif", 20))
        .margin(10)
        .margin_right(25)
        .x_label_area_size(45)
        .y_label_area_size(60)
        .build_cartesian_2d((1.0..2048.0).log_scale().base(2.0), (least / 1.5..most * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .x_desc("pages of a fault")
        .y_desc("µs for each page")
        .x_labels(12)
        .y_labels(6)
        .x_label_formatter(&|pages| format!("{pages:.0}"))
        .y_label_formatter(&|us| format!("{us}"))
        .draw()?;
    for (name, colour, us) in kernel {
        chart
            .draw_series(LineSeries::new([(1.0, us), (2048.0, us)], colour.stroke_width(2)))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .draw_series(LineSeries::new(points, BLUE.stroke_width(2)).point_size(3))?
        .label("a handler in user space")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 20, y)], BLUE.stroke_width(2)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}
