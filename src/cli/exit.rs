//! Exit codes, and the one line that explains any but 0.

use std::{fmt::Display, process::ExitCode};

use crate::wire::{ExecutionReport, Status, Verdict};

/// The thing checked is wrong, or the service could not be kept up.
pub const FAILURE: u8 = 1;
/// The command line is wrong; clap's own.
pub const USAGE: u8 = 2;
/// The server can't be reached (sysexits: EX_UNAVAILABLE).
pub const UNREACHABLE: u8 = 69;
/// Bad configuration (sysexits: EX_CONFIG).
pub const BAD_CONFIGURATION: u8 = 78;
/// Refused, or failed by the dispatcher's own fault.
pub const REFUSED: u8 = 125;

const TIMED_OUT: u8 = 124;
/// As a shell tells of SIGKILL.
const OVER_A_LIMIT: u8 = 137;
/// As a shell tells of SIGSYS.
const SYSCALL_DENIED: u8 = 159;
/// As a shell tells of SIGINT.
const CANCELLED: u8 = 130;

/// The exit code of `run` and `call` for a reply.
#[must_use]
pub fn code(report: &ExecutionReport) -> u8 {
    match report.verdict() {
        Verdict::Exited | Verdict::Completed => u8::try_from(report.exit_code).unwrap_or(REFUSED),
        Verdict::Signalled => u8::try_from(128 + report.signal).unwrap_or(REFUSED),
        Verdict::TimedOut => TIMED_OUT,
        Verdict::OutOfMemory | Verdict::CpuTimeExceeded | Verdict::OutputExceeded => OVER_A_LIMIT,
        Verdict::SyscallDenied => SYSCALL_DENIED,
        Verdict::Cancelled => CANCELLED,
        Verdict::Refused | Verdict::Failed | Verdict::Unspecified => REFUSED,
    }
}

/// `dispatcher: VERDICT reason: text`, for whoever reads standard error.
#[must_use]
pub fn line(report: &ExecutionReport, status: &Status) -> String {
    let verdict = report.verdict().as_str_name().trim_start_matches("VERDICT_");
    let reason = status.details.get("reason").map_or("failed", String::as_str);
    format!("dispatcher: {verdict} {reason}: {}", printable(&status.message))
}

/// Says what is wrong and gives the code.
pub fn fail(code: u8, what: impl Display) -> ExitCode {
    eprintln!("dispatcher: {what}");
    ExitCode::from(code)
}

/// Text of a stranger's for a terminal: no escape sequence gets through.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() && c != '\t' { char::REPLACEMENT_CHARACTER } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(verdict: Verdict, exit_code: i32, signal: i32) -> ExecutionReport {
        ExecutionReport { verdict: verdict.into(), exit_code, signal, ..Default::default() }
    }

    #[test]
    fn codes_are_those_of_shells() {
        for (verdict, exit, signal, expected) in [
            (Verdict::Exited, 0, 0, 0),
            (Verdict::Exited, 7, 0, 7),
            (Verdict::Signalled, 0, 11, 139),
            (Verdict::TimedOut, 0, 9, 124),
            (Verdict::OutOfMemory, 0, 9, 137),
            (Verdict::CpuTimeExceeded, 0, 9, 137),
            (Verdict::OutputExceeded, 0, 9, 137),
            (Verdict::SyscallDenied, 0, 9, 159),
            (Verdict::Refused, 0, 0, 125),
            (Verdict::Failed, 0, 0, 125),
            (Verdict::Unspecified, 0, 0, 125),
        ] {
            assert_eq!(code(&report(verdict, exit, signal)), expected, "{verdict:?}");
        }
    }

    #[test]
    fn the_line_has_verdict_reason_and_text_but_no_escape() {
        let status = Status {
            message: "no\x1b[31m policy".into(),
            details: [("reason".to_owned(), "no_policy".to_owned())].into(),
            ..Default::default()
        };
        assert_eq!(
            line(&report(Verdict::Refused, 0, 0), &status),
            "dispatcher: REFUSED no_policy: no\u{fffd}[31m policy"
        );
    }
}
