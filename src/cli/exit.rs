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

/// The reason of a reply whose status is a gRPC service's own: it is told by its name.
const SERVICE_STATUS: &str = "service_status";
/// In place of a message that is empty.
const NO_MESSAGE: &str = "(no message)";

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
    let message = printable(&status.message);
    let text = match (reason == SERVICE_STATUS, message.is_empty()) {
        (true, true) => format!("{} {NO_MESSAGE}", status.code().as_str_name()),
        (true, false) => format!("{}: {message}", status.code().as_str_name()),
        (false, _) => or_none(&message).to_owned(),
    };
    format!("dispatcher: {verdict} {reason}: {text}")
}

/// A message without the end of a standard error that it ends with and that was
/// printed already, as a service's that did not start.
#[must_use]
pub fn without_tail(message: &str, printed: &[u8]) -> String {
    const TAIL: &str = "its standard error ends with: ";
    let printed = String::from_utf8_lossy(printed);
    // Whatever is left out was printed, whoever wrote these words.
    let tail = message.match_indices(TAIL).find(|(at, _)| {
        // Where it was cut within a character it begins with a replacement.
        let told = message[at + TAIL.len()..].trim_start_matches(char::REPLACEMENT_CHARACTER);
        !told.is_empty() && printed.trim_end().ends_with(told)
    });
    match tail {
        Some((at, _)) => format!("{}its standard error is above", &message[..at]),
        None => message.to_owned(),
    }
}

/// The message, or that there is none.
#[must_use]
pub fn or_none(message: &str) -> &str {
    if message.trim().is_empty() { NO_MESSAGE } else { message }
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

/// Text of a stranger's for one line of a terminal: lines are set side by side, and no
/// escape sequence gets through.
fn printable(text: &str) -> String {
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines
        .join(" | ")
        .chars()
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
    fn a_services_status_is_told_by_its_name() {
        for (code, message, expected) in [
            (status::Code::Unimplemented, "", "UNIMPLEMENTED (no message)"),
            (status::Code::Unimplemented, " \n", "UNIMPLEMENTED (no message)"),
            (status::Code::NotFound, "no such book", "NOT_FOUND: no such book"),
        ] {
            let status = Status {
                code: code.into(),
                message: message.into(),
                details: [("reason".to_owned(), "service_status".to_owned())].into(),
            };
            assert_eq!(
                line(&report(Verdict::Completed, 0, 0), &status),
                format!("dispatcher: COMPLETED service_status: {expected}")
            );
        }
        let status = Status { code: status::Code::Unknown.into(), ..Status::default() };
        assert_eq!(
            line(&report(Verdict::Failed, 0, 0), &status),
            "dispatcher: FAILED failed: (no message)"
        );
    }

    #[test]
    fn an_empty_message_is_told_as_one() {
        assert_eq!(or_none(" \n"), "(no message)");
        assert_eq!(or_none("why"), "why");
    }

    #[test]
    fn many_lines_are_set_on_one() {
        assert_eq!(printable("one\n\ttw\to\r\n\n  three\n"), "one | tw\to | three");
        assert_eq!(printable("a\rb\x1b[2J\x00"), "a\u{fffd}b\u{fffd}[2J\u{fffd}");
        assert_eq!(printable("\n\n"), "");
    }

    #[test]
    fn what_was_printed_is_not_told_again() {
        let message = "it exited; its standard error ends with: no\nhome";
        let above = "it exited; its standard error is above";
        assert_eq!(without_tail(message, b"first\nno\nhome\n"), above);
        let cut = "it exited; its standard error ends with: \u{fffd} home";
        assert_eq!(without_tail(cut, "n\u{e9} home".as_bytes()), above);
        // What wasn't printed is told.
        for printed in [&b"no\nhome and more"[..], b"home", b""] {
            assert_eq!(without_tail(message, printed), message);
        }
        for message in ["not found", "its standard error ends with: ", ""] {
            assert_eq!(without_tail(message, b"not found"), message);
        }
    }

    #[test]
    fn the_line_begins_a_line() {
        assert!(is_unfinished(b"half"));
        assert!(!is_unfinished(b"whole\n"));
        assert!(!is_unfinished(b""));
    }
}
