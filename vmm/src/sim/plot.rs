//! Simulated hosts as a picture: what was reclaimed, and who waited, stood still and was killed for it, over time, a line for
//! each policy.

use std::error::Error;
use std::time::Duration;

use memcg_core::sim::Sample;
use plotters::coord::Shift;
use plotters::prelude::*;

use super::Results;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

const SIZE: (u32, u32) = (960, 700);

/// Height of what says which line is whose.
const LEGEND: i32 = 60;

/// Colours that are told apart also by who sees few: Okabe and Ito's.
const COLOURS: [RGBColor; 3] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115)];

/// One of the charts: what it shows, and how that is had of a moment.
type Chart = (&'static str, fn(&Sample) -> f64);

/// The charts, by rows.
const CHARTS: [Chart; 4] = [
    ("reclaimed, TiB in all", |sample| tib((sample.sums.evicted + sample.sums.given).bytes())),
    ("waiting for memory, VM hours in all", |sample| hours(sample.sums.stalled)),
    ("paused, VM hours in all", |sample| hours(sample.sums.paused)),
    ("killed, VMs in all", |sample| sample.sums.kills as f64),
];

fn tib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 40) as f64
}

fn hours(time: Duration) -> f64 {
    time.as_secs_f64() / 3600.0
}

/// Draws the results of some policies.
///
/// # Errors
/// When the library cannot draw.
pub fn svg(title: &str, results: &[Results]) -> Result<String, Box<dyn Error>> {
    let mut text = String::new();
    let lines: Vec<_> = results.iter().map(Results::samples).collect();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(title, ("sans-serif", 20))?;
        let (legend, charts) = root.split_vertically(LEGEND);
        name(&legend, results)?;
        for (area, chart) in charts.split_evenly((2, 2)).iter().zip(CHARTS) {
            draw(area, chart, &lines)?;
        }
        root.present()?;
    }
    Ok(text)
}

/// Which line is whose, and how evenly that policy has treated all VMs.
fn name(area: &Area<'_>, results: &[Results]) -> Result<(), Box<dyn Error>> {
    for (row, (results, colour)) in results.iter().zip(COLOURS).enumerate() {
        let y = 2 + 19 * row as i32;
        area.draw(&Rectangle::new([(70, y + 6), (97, y + 8)], colour.filled()))?;
        let text = format!("{}: fairness {:.4}", results.policy.name(), results.fairness());
        area.draw(&Text::new(text, (105, y), ("sans-serif", 14)))?;
    }
    Ok(())
}

fn draw(area: &Area<'_>, (what, of): Chart, lines: &[Vec<Sample>]) -> Result<(), Box<dyn Error>> {
    let minutes = |sample: &Sample| sample.at.as_secs_f64() / 60.0;
    let all = || lines.iter().flatten();
    let end = all().map(minutes).fold(1e-3, f64::max);
    let top = all().map(of).fold(1e-3, f64::max) * 1.08;
    let digits = [0.05, 0.5, 5.0].iter().filter(|least| top < **least).count();
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .x_label_area_size(45)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..end, 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .axis_desc_style(("sans-serif", 15))
        .label_style(("sans-serif", 13))
        .x_desc("time in minutes")
        .y_desc(what)
        .y_labels(6)
        .x_label_formatter(&|minutes| format!("{minutes:.0}"))
        .y_label_formatter(&|value| format!("{value:.digits$}"))
        .draw()?;
    for (samples, colour) in lines.iter().zip(COLOURS) {
        let points = samples.iter().map(|sample| (minutes(sample), of(sample)));
        chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use memcg_core::sim::synthetic::Scenario;
    use memcg_core::sim::{Outcome, Policy};

    use super::super::Fleet;
    use super::*;

    #[test]
    fn a_picture_has_a_line_for_each_policy_in_each_chart() {
        let fleet = Fleet::Drawn { scenario: *Scenario::find("idle").unwrap(), seed: 1, hosts: 1, vms: 5 };
        let minute = Duration::from_secs(60);
        let results = Policy::ALL.map(|policy| fleet.run(policy, 3 * minute, minute).unwrap());
        let picture = svg("a title", &results).unwrap();
        assert!(picture.starts_with("<svg") && picture.contains("a title"));
        for policy in Policy::ALL {
            assert!(picture.contains(&format!("{}: fairness", policy.name())));
        }
        let lines =
            COLOURS.map(|RGBColor(r, g, b)| picture.matches(&format!("stroke=\"#{r:02X}{g:02X}{b:02X}\"")).count());
        assert_eq!(lines, [CHARTS.len(); 3]);
        let nothing = [Results { policy: Policy::Proportional, hosts: vec![Outcome::default()] }];
        assert!(svg("nothing", &nothing).is_ok());
    }
}
