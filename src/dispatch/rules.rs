//! What a policy says to a call: pure decisions, no I/O.

use std::{fmt::Display, time::Duration};

use super::CallError;
use crate::{
    call::{Call, Source},
    jail::plan::Mode,
    policy::{OutputFormat, Policy, PolicySet},
    units::{Limit, MilliCpus, Size, Span},
};

/// What holds for one call: the policy's limits, tightened by the request's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// How it is executed.
    pub mode: Mode,
    /// How its stdout becomes output.
    pub output: OutputFormat,
    /// Wall clock.
    pub timeout: Limit<Duration>,
    /// CPU time of the whole tree.
    pub cpu_time: Limit<Duration>,
    /// Bytes of memory.
    pub memory: Limit<u64>,
    /// Share of processor time.
    pub cpus: Limit<MilliCpus>,
    /// Bytes of stdout.
    pub output_size: Limit<u64>,
}

/// Whose rules?
///
/// # Errors
/// [`CallError::NoPolicy`]
pub fn choose<'a>(policies: &'a PolicySet, call: &Call) -> Result<&'a Policy, CallError> {
    policies
        .choose(&call.namespace, call.service.as_str(), call.method.as_str())
        .ok_or_else(|| CallError::NoPolicy(call.namespace.to_string()))
}

/// Is all that is asked for allowed? Nothing is clamped in silence.
///
/// # Errors
/// The first rule that is broken.
pub fn decide(call: &Call, policy: &Policy) -> Result<Terms, CallError> {
    check_service(call, policy)?;
    let mode = mode(call, policy)?;
    check_source(call, policy)?;
    check_environment(call, policy)?;
    let (limits, asked) = (&policy.limits, &call.limits);
    let input = call.input.as_ref().map(|input| input.value.len() as u64);
    check_limit(policy, "timeout", asked.timeout, limits.timeout, Span)?;
    check_limit(policy, "memory", asked.memory, limits.memory, Size)?;
    check_limit(policy, "cpus", asked.cpus, limits.cpus, |cpus| cpus)?;
    check_limit(policy, "input", input, limits.input, Size)?;
    Ok(Terms {
        mode,
        output: call.output.unwrap_or(policy.output),
        timeout: limits.timeout.tightened(asked.timeout),
        cpu_time: limits.cpu_time,
        memory: limits.memory.tightened(asked.memory),
        cpus: limits.cpus.tightened(asked.cpus),
        output_size: limits.output,
    })
}

fn check_service(call: &Call, policy: &Policy) -> Result<(), CallError> {
    let (service, method) = (call.service.as_str(), call.method.as_str());
    if policy.serves(service, method) {
        return Ok(());
    }
    Err(CallError::ServiceNotAllowed {
        policy: policy.id.policy.clone(),
        service: service.to_owned(),
        method: method.to_owned(),
    })
}

fn mode(call: &Call, policy: &Policy) -> Result<Mode, CallError> {
    let mode = call.mode.unwrap_or(policy.mode);
    if mode == policy.mode || policy.allow_modes.contains(&mode) {
        return Ok(mode);
    }
    Err(CallError::ModeNotAllowed { policy: policy.id.policy.clone(), mode })
}

fn check_source(call: &Call, policy: &Policy) -> Result<(), CallError> {
    let rules = &policy.artifacts;
    let refused = match &call.source {
        Source::Inline(_) if !rules.inline => Some("sending the binary in the request".to_owned()),
        Source::Uri(uri) if !rules.uris.iter().any(|prefix| uri.starts_with(prefix)) => {
            Some(format!("fetching {uri:?}"))
        }
        _ => None,
    };
    if let Some(what) = refused {
        return Err(CallError::SourceNotAllowed { policy: policy.id.policy.clone(), what });
    }
    let held = match call.source {
        Source::Held(digest) => Some(digest),
        _ => None,
    };
    let named = [held, call.digest].into_iter().flatten();
    match named.into_iter().find(|digest| !rules.digests.contains(digest)) {
        Some(digest) if !rules.digests.is_empty() => {
            Err(CallError::DigestNotAllowed { policy: policy.id.policy.clone(), digest })
        }
        _ => Ok(()),
    }
}

fn check_environment(call: &Call, policy: &Policy) -> Result<(), CallError> {
    match call.env.keys().find(|name| !policy.environment_allow.contains(name)) {
        Some(name) => {
            Err(CallError::EnvNotAllowed { policy: policy.id.policy.clone(), name: name.clone() })
        }
        None => Ok(()),
    }
}

/// `show` writes a value the way a policy does.
fn check_limit<T: PartialOrd + Copy, S: Display>(
    policy: &Policy,
    limit: &'static str,
    asked: Option<T>,
    given: Limit<T>,
    show: impl Fn(T) -> S,
) -> Result<(), CallError> {
    match (asked, given) {
        (Some(asked), Limit::At(given)) if asked > given => Err(CallError::OverPolicy {
            policy: policy.id.policy.clone(),
            limit,
            requested: show(asked).to_string(),
            allowed: show(given).to_string(),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{call::Input, names::Digest, testing};

    fn decided(change: impl FnOnce(&mut Call, &mut Policy)) -> Result<Terms, CallError> {
        let (mut call, mut policy) = (testing::call(), testing::policy("demo"));
        change(&mut call, &mut policy);
        decide(&call, &policy)
    }

    #[test]
    fn the_namespaces_own_policy_comes_before_the_default() {
        let set = testing::policy_set([testing::policy("demo"), testing::policy("default")]);
        let mut call = testing::call();
        assert_eq!(choose(&set, &call).unwrap().id.policy, "demo");
        call.namespace = "other".parse().unwrap();
        assert_eq!(choose(&set, &call).unwrap().id.policy, "default");
        let set = testing::policy_set([testing::policy("demo")]);
        assert!(matches!(choose(&set, &call), Err(CallError::NoPolicy(_))));
    }

    #[test]
    fn a_call_that_asks_for_nothing_gets_the_policys_terms() {
        let terms = decided(|_, _| {}).unwrap();
        assert_eq!(terms.mode, Mode::Jail);
        assert_eq!(terms.output, OutputFormat::Status);
        assert_eq!(terms.timeout, Limit::At(Duration::from_secs(30)));
        assert_eq!(terms.memory, Limit::At(512 << 20));
    }

    #[test]
    fn a_call_may_tighten() {
        let terms = decided(|call, policy| {
            call.limits.timeout = Some(Duration::from_secs(1));
            call.limits.memory = Some(8 << 20);
            call.limits.cpus = Some(MilliCpus(1000));
            call.output = Some(OutputFormat::Bytes);
            call.mode = Some(Mode::Direct);
            policy.allow_modes = vec![Mode::Direct];
        })
        .unwrap();
        assert_eq!(terms.timeout, Limit::At(Duration::from_secs(1)));
        assert_eq!(terms.memory, Limit::At(8 << 20));
        assert_eq!((terms.mode, terms.output), (Mode::Direct, OutputFormat::Bytes));
    }

    #[test]
    fn asking_for_more_is_refused_and_says_what_there_is() {
        type Case = (&'static str, &'static str, &'static str, fn(&mut Call));
        let cases: [Case; 4] = [
            ("timeout", "31s", "30s", |c| c.limits.timeout = Some(Duration::from_secs(31))),
            ("memory", "1GiB", "512MiB", |c| c.limits.memory = Some(1 << 30)),
            ("cpus", "1.5", "1", |c| c.limits.cpus = Some(MilliCpus(1500))),
            ("input", "33MiB", "32MiB", |c| {
                let value = vec![0; 33 << 20].into();
                c.input = Some(Input { type_url: String::new(), value });
            }),
        ];
        for (name, requested_text, allowed_text, change) in cases {
            let error = decided(|call, _| change(call)).unwrap_err();
            let CallError::OverPolicy { limit, requested, allowed, .. } = error else {
                panic!("{error}")
            };
            assert_eq!((limit, &*requested, &*allowed), (name, requested_text, allowed_text));
        }
        let unlimited = decided(|call, policy| {
            policy.limits.timeout = Limit::Unlimited;
            call.limits.timeout = Some(Duration::from_secs(9999));
        });
        assert_eq!(unlimited.unwrap().timeout, Limit::At(Duration::from_secs(9999)));
    }

    #[test]
    fn each_rule_refuses_by_name() {
        let digest = Digest::of(b"");
        assert!(matches!(
            decided(|_, policy| policy.services = vec!["other/*".into()]),
            Err(CallError::ServiceNotAllowed { .. })
        ));
        assert!(matches!(
            decided(|call, _| call.mode = Some(Mode::Direct)),
            Err(CallError::ModeNotAllowed { mode: Mode::Direct, .. })
        ));
        let sources: [fn(&mut Call, &mut Policy); 2] = [
            |call, policy| {
                call.source = Source::Inline(bytes::Bytes::new());
                policy.artifacts.inline = false;
            },
            |call, policy| {
                call.source = Source::Uri("https://b.example/x".into());
                policy.artifacts.uris = vec!["https://a.example/".into()];
            },
        ];
        for change in sources {
            assert!(matches!(decided(change), Err(CallError::SourceNotAllowed { .. })));
        }
        for held in [true, false] {
            let other = decided(|call, policy| {
                if held {
                    call.source = Source::Held(digest);
                } else {
                    call.digest = Some(digest);
                }
                policy.artifacts.digests = vec![Digest::of(b"x")];
            });
            assert!(matches!(other, Err(CallError::DigestNotAllowed { .. })));
        }
        assert!(matches!(
            decided(|call, policy| {
                call.env.insert("LD_PRELOAD".into(), "x".into());
                policy.environment_allow = vec!["LD_PRELOAD_".into()];
            }),
            Err(CallError::EnvNotAllowed { .. })
        ));
    }

    #[test]
    fn what_is_allowed_passes() {
        let digest = Digest::of(b"");
        assert!(
            decided(|call, policy| {
                policy.services = vec!["greet*/Say*".into()];
                call.source = Source::Held(digest);
                policy.artifacts.digests = vec![digest];
                policy.artifacts.inline = false;
                call.env.insert("VERBOSE".into(), "1".into());
                policy.environment_allow = vec!["VERBOSE".into()];
            })
            .is_ok()
        );
        assert!(
            decided(|call, policy| {
                call.source = Source::Uri("https://a.example/x".into());
                policy.artifacts.uris = vec!["https://a.example/".into()];
            })
            .is_ok()
        );
    }
}
