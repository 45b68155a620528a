//! Exit codes, and the one line that explains any but 0.

use std::{
    fmt::Display,
    io::{self, Write as _},
    process::ExitCode,
};

use crate::wire::{ExecutionReport, Status, Verdict, status};

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
fn code(report: &ExecutionReport, status: &Status) -> u8 {
    match report.verdict() {
        // A service's no is no success; neither is one that ended, however well.
        Verdict::Completed if status.code() != status::Code::Ok => REFUSED,
        Verdict::Completed => 0,
        Verdict::Exited if report.exit_code == 0 && status.code() == status::Code::Unavailable => {
            REFUSED
        }
        Verdict::Exited => u8::try_from(report.exit_code).unwrap_or(REFUSED),
        Verdict::Signalled => u8::try_from(128 + report.signal).unwrap_or(REFUSED),
        Verdict::TimedOut => TIMED_OUT,
        Verdict::OutOfMemory | Verdict::CpuTimeExceeded | Verdict::OutputExceeded => OVER_A_LIMIT,
        Verdict::SyscallDenied => SYSCALL_DENIED,
        Verdict::Cancelled => CANCELLED,
        Verdict::Refused | Verdict::Failed | Verdict::Unspecified => REFUSED,
    }
}

/// Ends `run` or `call`: the code, and the line where there is something to
/// explain. `unfinished`: the program's last line on standard error has no end.
#[must_use]
pub fn finish(report: &ExecutionReport, status: &Status, unfinished: bool) -> ExitCode {
    let code = code(report, status);
    // An output that isn't what was asked for leaves the program's 0 as it is.
    if code != 0 || status.code() != status::Code::Ok {
        let end = if unfinished { "\n" } else { "" };
        // Nobody reads it: the code still tells.
        writeln!(io::stderr(), "{end}{}", line(report, status)).ok();
    }
    ExitCode::from(code)
}

/// `dispatcher: VERDICT reason: text`, for whoever reads standard error.
fn line(report: &ExecutionReport, status: &Status) -> String {
    let verdict = report.verdict().as_str_name().trim_start_matches("VERDICT_");
    let reason = status.details.get("reason").map_or("failed", String::as_str);
    format!("dispatcher: {verdict} {reason}: {}", printable(&status.message))
}

/// Says what is wrong and gives the code.
#[must_use]
pub fn fail(code: u8, what: impl Display) -> ExitCode {
    writeln!(io::stderr(), "dispatcher: {}", printable(&what.to_string())).ok();
    ExitCode::from(code)
}

/// Whether a line of this text, if it is not empty, has no end.
#[must_use]
pub fn is_unfinished(text: &[u8]) -> bool {
    text.last().is_some_and(|last| *last != b'\n')
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
            (Verdict::Cancelled, 0, 9, 130),
            (Verdict::Exited, 256, 0, 125),
            (Verdict::Signalled, 0, 64, 192),
            (Verdict::Signalled, 0, 1000, 125),
            (Verdict::Refused, 0, 0, 125),
            (Verdict::Failed, 0, 0, 125),
            (Verdict::Unspecified, 0, 0, 125),
        ] {
            let status = Status::default();
            assert_eq!(code(&report(verdict, exit, signal), &status), expected, "{verdict:?}");
        }
    }

    #[test]
    fn a_services_no_is_no_success() {
        for (verdict, status, expected) in [
            (Verdict::Completed, status::Code::Ok, 0),
            (Verdict::Completed, status::Code::NotFound, 125),
            (Verdict::Exited, status::Code::Unavailable, 125),
            // An output that isn't what was asked for leaves the program's 0 as it is.
            (Verdict::Exited, status::Code::DataLoss, 0),
        ] {
            let status = Status { code: status.into(), ..Status::default() };
            assert_eq!(code(&report(verdict, 0, 0), &status), expected, "{verdict:?} {status:?}");
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

    #[test]
    fn the_line_begins_a_line() {
        assert!(is_unfinished(b"half"));
        assert!(!is_unfinished(b"whole\n"));
        assert!(!is_unfinished(b""));
    }
}
