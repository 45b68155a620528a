//! The latencies as a picture: a bar up to the median, a whisker up to the 99th percentile, on a
//! logarithmic scale. Greys and one blue that can be read on white and on black.

use std::fmt::Write as _;

use crate::{
    contestant::DISPATCHER,
    report::{Report, Row},
};

const WIDTH: f64 = 720.0;
const LEFT: f64 = 110.0;
const RIGHT: f64 = 90.0;
const TOP: f64 = 34.0;
const LINE: f64 = 28.0;
const BAR: f64 = 14.0;

/// Draws what was measured of one caller.
pub fn picture(report: &Report) -> String {
    let mut rows: Vec<&Row> =
        report.contestants.iter().filter(|row| row.latency.is_some()).collect();
    let p50 = |row: &Row| row.latency.as_ref().map_or(0.0, |latency| latency.p50_ms);
    rows.sort_by(|one, other| p50(one).total_cmp(&p50(other)));
    let scale = Scale::over(&rows);
    let bottom = TOP + LINE * rows.len() as f64;
    let height = bottom + 26.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"13\" fill=\"#808080\">\n\
         <title>Time of one run of each contestant</title>\n\
         <text x=\"{LEFT}\" y=\"18\">one run, ms: bar to the median, line to the 99th percentile</text>\n"
    );
    for power in scale.low..=scale.high {
        let value = 10f64.powi(power);
        let x = scale.x(value);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#808080\" stroke-opacity=\".35\"/>\
             <text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{value}</text>",
            bottom + 18.0
        );
    }
    for (index, row) in rows.iter().enumerate() {
        let y = TOP + LINE * (index as f64 + 0.5);
        svg.push_str(&bar(row, &scale, y));
    }
    svg + "</svg>\n"
}

fn bar(row: &Row, scale: &Scale, y: f64) -> String {
    let Some(latency) = &row.latency else { return String::new() };
    let (p50, p99) = (scale.x(latency.p50_ms), scale.x(latency.p99_ms));
    let colour = if row.name == DISPATCHER { "#2f81f7" } else { "#909090" };
    let (top, text, width) = (y - BAR / 2.0, y + 4.5, p50 - LEFT);
    format!(
        "<text x=\"{:.1}\" y=\"{text:.1}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{LEFT}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>\
         <path d=\"M{p50:.1} {y:.1}H{p99:.1}M{p99:.1} {:.1}v8\" stroke=\"{colour}\" stroke-width=\"2\"/>\
         <text x=\"{:.1}\" y=\"{text:.1}\">{}</text>\n",
        LEFT - 8.0,
        row.name,
        y - 4.0,
        p99 + 7.0,
        short(latency.p50_ms),
    )
}

/// Two digits that mean something.
fn short(value: f64) -> String {
    if value < 10.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

/// From milliseconds to places, by whole powers of ten.
struct Scale {
    low: i32,
    high: i32,
}

impl Scale {
    fn over(rows: &[&Row]) -> Self {
        let all = || rows.iter().filter_map(|row| row.latency.as_ref());
        let least = all().map(|latency| latency.p50_ms).fold(1.0, f64::min);
        let most = all().map(|latency| latency.p99_ms).fold(1.0, f64::max);
        let low = least.log10().floor() as i32;
        Self { low, high: (most.log10().ceil() as i32).max(low + 1) }
    }

    fn x(&self, value: f64) -> f64 {
        let share = (value.log10() - f64::from(self.low)) / f64::from(self.high - self.low);
        LEFT + (WIDTH - LEFT - RIGHT) * share
    }
}
