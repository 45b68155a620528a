//! How a call to a service went: the service's word, or why there is none.

use std::collections::BTreeMap;

use super::status::{CANCELLED, Summary, code_of, signal_name, timed_out};
use crate::{
    dispatch::{ByService, rules::Terms},
    execute::{Outcome, Verdict},
    instances::{ANSWER_MAX, Unanswered},
    protocol::grpc::unary::ServiceStatus,
    units::{Limit, Size, Span},
    wire::status::Code,
};

/// Bytes of a service's standard error that an error's text shows.
const SHOWN_MAX: usize = 1024;

/// Sums up a call that a service was to answer.
#[must_use]
pub fn summarize(outcome: &Outcome, service: &ByService, terms: Option<&Terms>) -> Summary {
    let summary = match &service.answer {
        Ok(status) => answered(status),
        Err(why) => unanswered(why, outcome, terms),
    };
    match service.instance {
        Some(instance) => summary.with("instance", instance),
        None => summary,
    }
}

/// The service's own status.
fn answered(status: &ServiceStatus) -> Summary {
    let mut summary = match code(status.code) {
        Code::Ok => Summary {
            code: Code::Ok,
            verdict: Verdict::Completed,
            reason: None,
            message: status.message.clone(),
            details: BTreeMap::new(),
            retry_after: None,
        },
        code => Summary::new(code, Verdict::Completed, "service_status", status.message.clone())
            .with("grpc_code", status.code),
    };
    for (name, value) in &status.trailers {
        let entry = summary.details.entry(format!("trailer.{name}"));
        // As HTTP joins what is given more than once.
        entry.and_modify(|known| *known = format!("{known},{value}")).or_insert(value.clone());
    }
    summary
}

/// gRPC's number as Collector's; one that gRPC doesn't know is UNKNOWN.
fn code(number: u8) -> Code {
    code_of(tonic::Code::from_i32(number.into()))
}

fn unanswered(why: &Unanswered, outcome: &Outcome, terms: Option<&Terms>) -> Summary {
    let summary = |code, reason, text: String| Summary::new(code, outcome.verdict, reason, text);
    match why {
        Unanswered::TimedOut => timed_out("service took", outcome, terms),
        Unanswered::Cancelled => {
            let text = "the call was cancelled while the service had it".to_owned();
            summary(Code::Cancelled, CANCELLED, text)
        }
        Unanswered::TooLarge => {
            let limit = terms.and_then(|terms| terms.output_size.finite()).unwrap_or(ANSWER_MAX);
            let text = "the service's answer is larger than it may be".to_owned();
            summary(Code::ResourceExhausted, "output", text)
                .over("output", Some(Size(limit.min(ANSWER_MAX)).to_string()))
        }
        Unanswered::Streaming { called } => {
            let told = if *called { "answered with" } else { "is a method with" };
            let text = format!("it {told} a stream of messages; only unary methods can be called");
            summary(Code::Unimplemented, "streaming", text)
        }
        Unanswered::BadAnswer(what) => {
            summary(Code::Unknown, "bad_answer", format!("the service answered wrongly: {what}"))
        }
        Unanswered::ConnectionLost(what) => {
            let text = format!("the service left the call unanswered: {what}");
            summary(Code::Unavailable, "connection_lost", text)
        }
        Unanswered::Ended => with_log(ended(outcome, terms, "while it had the call"), outcome),
        Unanswered::EndedAtStart => {
            with_log(ended(outcome, terms, "before it answered anything"), outcome)
        }
        Unanswered::StartTimeout(within) => {
            let text = format!(
                "the service did not answer within {}: neither at descriptor 3 nor at GRPC_UNIX_SOCKET",
                Span(*within)
            );
            let limited = summary(Code::DeadlineExceeded, "start_timeout", text)
                .over("start_timeout", Some(Span(*within).to_string()));
            with_log(limited, outcome)
        }
        Unanswered::NotGrpc(what) => {
            let text = format!("the service doesn't speak gRPC: {what}");
            with_log(summary(Code::Unavailable, "not_grpc", text), outcome)
        }
    }
}

/// The process is gone; another call gets another one, so all of these can be tried again.
fn ended(outcome: &Outcome, terms: Option<&Terms>, when: &str) -> Summary {
    let (reason, how) = match outcome.verdict {
        Verdict::Exited if outcome.exit_code == 0 => ("exited", "exited".to_owned()),
        Verdict::Exited => ("exit_nonzero", format!("exited with code {}", outcome.exit_code)),
        Verdict::Signalled => {
            ("signalled", format!("was ended by {}", signal_name(outcome.signal)))
        }
        Verdict::OutOfMemory => ("out_of_memory", "needed more memory than it may have".to_owned()),
        Verdict::SyscallDenied => {
            let how = match outcome.denied_syscall.as_str() {
                "" => "made a forbidden system call (which, a jail could tell)".to_owned(),
                name => format!("made the forbidden system call {name}"),
            };
            ("syscall_denied", how)
        }
        Verdict::Failed => match &outcome.failure {
            Some((reason, text)) => (*reason, format!("was lost: {text}")),
            None => ("internal", "was lost".to_owned()),
        },
        _ => ("instance_stopped", "was stopped".to_owned()),
    };
    let ours = matches!(reason, "internal" | "host_memory");
    let code = if ours { Code::Internal } else { Code::Unavailable };
    let text = format!("the service's process {how} {when}");
    let mut summary = Summary::new(code, outcome.verdict, reason, text);
    if outcome.verdict == Verdict::Exited {
        summary = summary.with("exit_code", outcome.exit_code);
    }
    if outcome.signal != 0 {
        summary = summary.with("signal", outcome.signal);
    }
    if outcome.verdict == Verdict::OutOfMemory {
        let limit = terms.and_then(|terms| Limit::finite(terms.memory));
        summary = summary.over("memory", limit.map(|limit| Size(limit).to_string()));
    }
    summary
}

/// With the end of what it wrote to its standard error: why it did not come so far.
fn with_log(mut summary: Summary, outcome: &Outcome) -> Summary {
    let tail = &outcome.stderr[outcome.stderr.len().saturating_sub(SHOWN_MAX)..];
    let text = String::from_utf8_lossy(tail);
    let text = text.trim();
    let said = if text.is_empty() {
        "it wrote nothing to standard error".to_owned()
    } else {
        format!("its standard error ends with: {text}")
    };
    summary.message = format!("{}; {said}", summary.message);
    summary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_same_names_and_other_numbers() {
        for number in 0..=16_u8 {
            let ours = code(number).as_str_name().replace('_', "");
            let theirs = format!("{:?}", tonic::Code::from_i32(number.into())).to_uppercase();
            assert_eq!(ours, theirs);
        }
        assert_eq!(code(4), Code::DeadlineExceeded);
        assert_eq!(code(99), Code::Unknown);
    }

    #[test]
    fn trailers_can_be_told_from_what_we_say() {
        let trailer = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let status = ServiceStatus {
            code: 9,
            message: "not now".into(),
            trailers: vec![trailer("reason", "a"), trailer("reason", "b"), trailer("x-bin", "AA")],
        };
        let summary = answered(&status);
        assert_eq!((summary.code, summary.verdict), (Code::FailedPrecondition, Verdict::Completed));
        assert_eq!(summary.message, "not now");
        let details: Vec<_> =
            summary.details.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let expected = [
            ("grpc_code", "9"),
            ("reason", "service_status"),
            ("trailer.reason", "a,b"),
            ("trailer.x-bin", "AA"),
        ];
        assert_eq!(details, expected);
    }
}
