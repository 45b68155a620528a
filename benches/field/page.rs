//! What was found, as docs/performance.md has it: its tables, in the same order.

use std::fmt::Write as _;

use crate::{
    Outcome,
    alive::Alive,
    cold::Cold,
    containers::Containers,
    contestant::{DISPATCHER, SPAWN},
    idle::Idle,
    large::Large,
    latency::Breakdown,
    machine::Machine,
    ready::Ready,
    report::{Goal, Report, Row},
    services::Services,
    stats::Summary,
};

/// All that was measured, to be shown.
pub fn of(report: &Report) -> String {
    let parts: Vec<String> = parts(report).into_iter().map(|(_, text)| text).collect();
    parts.join("\n")
}

/// The page with what was measured in place of what stood there: between `<!-- NAME -->` and the next
/// `<!-- end -->`.
pub fn fill(page: &str, report: &Report) -> Outcome<String> {
    let mut page = page.to_owned();
    for (name, text) in parts(report) {
        let begin = format!("<!-- {name} -->\n");
        let from = page.find(&begin).map(|at| at + begin.len());
        let from = from.ok_or_else(|| format!("the page has no place for {name}"))?;
        let length = page[from..].find(END).ok_or_else(|| format!("{name} has no end"))?;
        page.replace_range(from..from + length, &format!("\n{text}\n"));
    }
    Ok(page)
}

const END: &str = "<!-- end -->";

/// Each part by its name on the page; those not measured are left out.
fn parts(report: &Report) -> Vec<(&'static str, String)> {
    let mut parts = vec![
        ("machine", machine(report)),
        ("contestants", contestants(report)),
        ("goals", goals(report)),
        ("idle", report.idle.as_ref().map(idle).unwrap_or_default()),
        ("large", report.large.as_ref().map(large).unwrap_or_default()),
        ("memory", memory(report)),
        ("cold", report.cold.as_ref().map(cold).unwrap_or_default()),
        ("services", report.services.as_ref().map(services).unwrap_or_default()),
        ("containers", report.containers.as_ref().map(containers).unwrap_or_default()),
        ("breakdown", report.breakdown.as_ref().map(breakdown).unwrap_or_default()),
        ("others", others(report)),
    ];
    parts.retain(|(_, text)| !text.is_empty());
    parts
}

fn machine(report: &Report) -> String {
    let Machine { cpu, cores, memory_mib, kernel, cgroups, date, version, quiet, .. } =
        &report.machine;
    let (before, after) = (&report.machine.load_before, &report.machine.load_after);
    let quiet = if *quiet { "quiet at the start" } else { "**not quiet at the start**" };
    let list = |words: &[String]| words.join(" ");
    let lacking = match &report.not_in_force[..] {
        [] => "nothing of the default policy".into(),
        some => format!("**{}**", list(some)),
    };
    let mut text = format!(
        "| | |\n| --- | --- |\n| processor | {cpu} |\n| cores, memory | {cores}, {memory_mib} MiB |\n\
         | kernel, cgroups | Linux {kernel}, {cgroups} |\n\
         | load before and after | {before}; {after}; {quiet} |\n\
         | date, version | {date}; {version} |\n"
    );
    if !report.enforced.is_empty() {
        let _ = writeln!(text, "| in force in every call | {} |", list(&report.enforced));
        let _ = writeln!(text, "| not in force | {lacking} |");
    }
    for note in &report.notes {
        let _ = writeln!(text, "| note | {note} |");
    }
    text
}

fn contestants(report: &Report) -> String {
    if report.contestants.is_empty() {
        return String::new();
    }
    let median = |row: &Row| row.latency.as_ref().map(|latency| latency.p50_ms);
    let spawn = report.find(SPAWN).and_then(median);
    let numbers: Vec<usize> =
        report.find(DISPATCHER).map_or(vec![], |row| row.runs_per_s.keys().copied().collect());
    let mut text = String::from("| | p50 | p99 | × spawn |");
    for callers in &numbers {
        let _ = write!(text, " runs/s at {callers} | idle |");
    }
    text.push_str(" busy | after |\n| --- | --- | --- | --- |");
    text.push_str(&" --- |".repeat(2 * numbers.len() + 2));
    text.push('\n');
    for row in &report.contestants {
        let latency = row.latency.as_ref();
        let times = latency.zip(spawn).map(|(latency, spawn)| latency.p50_ms / spawn);
        let _ = write!(
            text,
            "| {} | {} | {} | {} |",
            row.name,
            cell(latency.map(|latency| latency.p50_ms), 2, " ms"),
            cell(latency.map(|latency| latency.p99_ms), 2, ""),
            cell(times, 2, ""),
        );
        for callers in &numbers {
            let idle = row.idle_share.get(callers).map(|share| share * 100.0);
            let _ =
                write!(text, " {} | {} |", cell(row.rate(*callers), 0, ""), cell(idle, 0, " %"));
        }
        let most = numbers.last();
        let of_most = |map: &std::collections::BTreeMap<usize, f64>| {
            most.and_then(|callers| map.get(callers)).copied()
        };
        let (all, after) = (of_most(&row.busy_ms_per_run), of_most(&row.busy_after_ms_per_run));
        let _ = writeln!(text, " {} | {} |", cell(all, 2, " ms"), cell(after, 2, " ms"));
    }
    for (name, why) in &report.absent {
        let _ = writeln!(text, "\n{name} was not measured: {why}");
    }
    if let Some(Summary { p50_ms, p99_ms, .. }) = &report.control {
        let _ = write!(
            text,
            "\nThe spawn alone, before a server was started: p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms."
        );
        if let Some(ours) = report.find(DISPATCHER).and_then(median) {
            let _ = write!(text, " The dispatcher's p50 is {:.2} times that.", ours / p50_ms);
        }
        text.push('\n');
    }
    text
}

fn others(report: &Report) -> String {
    let mut text = String::new();
    for Row { name, version, started, leaves_out, .. } in &report.contestants {
        if name != DISPATCHER {
            let _ = writeln!(text, "| {name} | {version} | {started} | {leaves_out} |");
        }
    }
    if text.is_empty() {
        return text;
    }
    let head = "| | version | as it is started here | what is missing |\n";
    format!("{head}| --- | --- | --- | --- |\n{text}")
}

fn breakdown(breakdown: &Breakdown) -> String {
    let Breakdown { queue_ms, setup_ms, wall_ms, cpu_ms, rest_ms, total_ms, .. } = breakdown;
    let Breakdown { empty_rpc_ms, refused_ms, .. } = breakdown;
    let mut text = String::from("| part | ms | what it is |\n| --- | --- | --- |\n");
    for (part, ms, what) in [
        ("queue", *queue_ms, "waiting for a permit"),
        (
            "setup",
            *setup_ms,
            "from the launcher's having the call until it told the program's process to start",
        ),
        (
            "wall",
            *wall_ms,
            "from then until init's word of the end: that process wakes, maps argv and environment, \
             places its descriptors, sets rlimits, enters Landlock, installs the filter, hands over \
             the filter's listener, execs; the program; its end",
        ),
        ("the rest", *rest_ms, "all else:"),
        ("- an RPC", *empty_rpc_ms, "the same message to a server that does nothing, and back"),
        (
            "- before a launch",
            refused_ms - empty_rpc_ms,
            "what else a call takes of a program that isn't held: policy, looking for it, audit record",
        ),
        (
            "- what is left",
            rest_ms - refused_ms,
            "two memfds, two pipes, handing over to the launcher, its reading usage and answering, \
             reading output to its end, the reply",
        ),
        ("all", *total_ms, "as the caller saw it"),
    ] {
        let _ = writeln!(text, "| {part} | {ms:.3} | {what} |");
    }
    let _ = writeln!(text, "\nProcessor time of the run, at the median: {cpu_ms:.3} ms.");
    text
}

fn goals(report: &Report) -> String {
    if report.goals.is_empty() {
        return String::new();
    }
    let mut text = String::from("| goal | wanted | found |\n| --- | --- | --- |\n");
    for Goal { what, found, wanted, met } in &report.goals {
        let missed = if *met { "" } else { ", **missed**" };
        let _ = writeln!(text, "| {what} | {wanted} | {found:.2}{missed} |");
    }
    text
}

fn idle(idle: &Idle) -> String {
    let Idle { sleepers, before, with_sleepers, after, times_before, times_mean } = idle;
    let mut text = String::from("| jails asleep | p50 | p99 |\n| --- | --- | --- |\n");
    for (what, one) in
        [("none", before), (&*sleepers.to_string(), with_sleepers), ("none again", after)]
    {
        let _ = writeln!(text, "| {what} | {:.3} ms | {:.3} ms |", one.p50_ms, one.p99_ms);
    }
    let _ = writeln!(
        text,
        "\nThe second p50 is {times_before:.2} times the first, \
         and {times_mean:.2} times the mean of the first and the third."
    );
    text
}

fn large(large: &Large) -> String {
    let Large { bytes, empty, same, new, .. } = large;
    let mut text = format!("| {} MiB inline | p50 | p99 |\n| --- | --- | --- |\n", bytes >> 20);
    for (what, one) in [("an empty RPC", empty), ("same", same), ("new", new)] {
        let _ = writeln!(text, "| {what} | {:.1} ms | {:.1} ms |", one.p50_ms, one.p99_ms);
    }
    text
}

fn memory(report: &Report) -> String {
    let mut text = String::new();
    if let Some(large) = &report.large {
        let times = |found: u64| {
            let mib = found >> 20;
            format!("{mib} MiB, {:.2} times the binary", found as f64 / large.bytes as f64)
        };
        let Large { resident_peak_bytes, memfds_first_bytes, .. } = large;
        let Large { memfds_full_bytes, memfds_kept_bytes, .. } = large;
        for (what, found) in [
            ("resident in the server at most", resident_peak_bytes),
            ("memfds and the like, one binary sent", memfds_first_bytes),
            ("the same, the cache full and new ones sent", memfds_full_bytes),
            ("memfds kept afterwards, by the cache", memfds_kept_bytes),
        ] {
            let _ = writeln!(text, "| {what} | {} |", times(*found));
        }
    }
    if let Some(ready) = &report.ready {
        let Ready { jails, kib_per_jail, kib_less_available, kib_uncertain } = ready;
        let _ = writeln!(
            text,
            "| a jail held ready, of {jails} | {kib_per_jail:.0} KiB in use (± {kib_uncertain:.0}); \
             {kib_less_available:.0} KiB less available |"
        );
    }
    if let Some(alive) = &report.alive {
        let Alive { jails, kib_per_jail, seconds_to_begin, seconds_to_end } = alive;
        let _ = writeln!(
            text,
            "| a jail with its program asleep, of {jails} | {kib_per_jail:.0} KiB less available; \
             all begun in {seconds_to_begin:.1} s, gone in {seconds_to_end:.1} s |"
        );
    }
    if text.is_empty() { text } else { format!("| memory | |\n| --- | --- |\n{text}") }
}

fn cold(cold: &Cold) -> String {
    let Cold { started, started_next, renewed, renewed_next, .. } = cold;
    let Cold { started_setup_ms, renewed_setup_ms, .. } = cold;
    let mut text = String::from(
        "| first call | p50 | at most | its setup | the next, p50 |\n| --- | --- | --- | --- | --- |\n",
    );
    for (what, first, setup, next) in [
        ("after a start, with the program", started, started_setup_ms, started_next),
        ("after the policy changed", renewed, renewed_setup_ms, renewed_next),
    ] {
        let _ = writeln!(
            text,
            "| {what} | {:.2} ms | {:.2} ms | {setup:.2} ms | {:.2} ms |",
            first.p50_ms, first.max_ms, next.p50_ms
        );
    }
    let Summary { p50_ms, p99_ms, .. } = &cold.paced;
    let _ =
        writeln!(text, "\nCalls 20 ms after each other: p50 {p50_ms:.2} ms, p99 {p99_ms:.2} ms.");
    text
}

fn services(services: &Services) -> String {
    let Services { straight, warm, bare_start, cold, callers, straight_per_s, warm_per_s } =
        services;
    let mut text = String::from(
        "| | straight, bare | by the dispatcher | times |\n| --- | --- | --- | --- |\n",
    );
    for (what, bare, ours) in [
        ("a warm call, p50", straight.p50_ms, warm.p50_ms),
        ("the same, p99", straight.p99_ms, warm.p99_ms),
        ("a start to its first answer, p50", bare_start.p50_ms, cold.p50_ms),
        ("the same, p99", bare_start.p99_ms, cold.p99_ms),
    ] {
        let _ = writeln!(text, "| {what} | {bare:.3} ms | {ours:.3} ms | {:.2} |", ours / bare);
    }
    let _ = writeln!(
        text,
        "| calls per second of {callers} callers | {straight_per_s:.0} | {warm_per_s:.0} | |"
    );
    text
}

fn containers(containers: &Containers) -> String {
    let Containers { docker_run, made, ahead } = containers;
    let mut text = String::from("| | p50 | p99 | times |\n| --- | --- | --- | --- |\n");
    for (what, found) in [
        ("docker run --rm", docker_run),
        ("by the dispatcher", made),
        ("by the dispatcher, a container made ahead", ahead),
    ] {
        let times = found.p50_ms / docker_run.p50_ms;
        let (p50, p99) = (found.p50_ms, found.p99_ms);
        let _ = writeln!(text, "| {what} | {p50:.0} ms | {p99:.0} ms | {times:.2} |");
    }
    text
}

fn cell(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}{unit}"))
}
