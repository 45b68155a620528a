//! One call, from request to reply; [`Dispatcher::steps`] reads as the sentence.
//!
//! The server and `dispatcher run` both come through here.

mod error;
pub mod rules;
#[cfg(test)]
mod service_tests;
#[cfg(test)]
mod tests;

pub use error::CallError;

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    admission::{self, Admission, Load, Permit, bytes::Reservation},
    artifact::{
        self, Artifact, ArtifactError, elf,
        store::{Content, Held, Store},
    },
    call::{Call, FormError, Source},
    execute::{ExecuteError, Executors, Invocation, Outcome, OutputSink, stop::StopSignal},
    instances::{self, Answered, Ask, Instances, Key, Recipe, Served, Shape, Unanswered},
    jail::{message::Refusal, plan::Mode},
    names::{Digest, RunId},
    policy::{Policy, PolicySet, Protocol, store::PolicyStore},
    protocol::{
        exec,
        grpc::{
            self, metadata,
            unary::{ServiceStatus, Unary},
        },
    },
    units::Limit,
};
use rules::Terms;

/// How often a call is decided anew because the policies changed under it.
const STALE_RETRIES: u32 = 2;

/// Everything that calls share.
///
/// To use it in-process: make a [`PolicyStore`] and an [`Admission`], give a
/// [`Launcher`](crate::execute::launcher::Launcher) its socket by `attach`, and hand each call to
/// [`Dispatcher::dispatch`] with a sink for live output in its [`Context`].
#[derive(Debug)]
pub struct Dispatcher {
    policies: Arc<PolicyStore>,
    artifacts: Store,
    admission: Admission,
    executors: Executors,
    instances: Instances,
}

/// What surrounds one call.
#[derive(Debug)]
pub struct Context {
    /// Its id, from [`RunId::random`].
    pub run: RunId,
    /// When it must be over, so that its report still arrives in time.
    pub deadline: Option<Instant>,
    /// Heard when nobody waits for it any more.
    pub stop: StopSignal,
    /// Gets its output as it comes.
    pub sink: Option<OutputSink>,
    /// The memory its request was given; cut down to what is still needed.
    pub reservation: Option<Reservation>,
}

/// How a call went.
#[derive(Clone, Debug)]
pub struct Reply {
    /// What is known of it either way.
    pub facts: Facts,
    /// What came out, or why nothing did.
    pub result: Result<Finished, CallError>,
}

/// What the pipeline found out on its way.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The call's id.
    pub run: RunId,
    /// How long it waited for its permit.
    pub queue_time: Duration,
    /// How it was, or would have been, executed.
    pub mode: Option<Mode>,
    /// The executable's digest.
    pub artifact: Option<Digest>,
    /// The policy's name and digest.
    pub policy: Option<(String, Digest)>,
    /// The digest of all policies in force.
    pub policy_set: Option<Digest>,
    /// The limits that held for it.
    pub terms: Option<Terms>,
    /// Keys of `execution_context` that mean nothing here.
    pub ignored_context: Vec<String>,
    /// A service that was there before the call answered it.
    pub warm: bool,
    /// The whole service was stopping, and stopped the call unless that had ended.
    pub draining: bool,
}

/// A program that ran.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How.
    pub outcome: Outcome,
    /// Its stdout in the form asked for, or a service's message.
    pub output: Option<prost_types::Any>,
    /// `false`: it was to be a serialized Any and isn't.
    pub output_fits: bool,
    /// Where a service was to answer.
    pub service: Option<ByService>,
}

/// A call that a service was to answer.
#[derive(Clone, Debug)]
pub struct ByService {
    /// The run that is the service's process.
    pub instance: Option<RunId>,
    /// Its status, or why there is none.
    pub answer: Result<ServiceStatus, Unanswered>,
}

impl Reply {
    /// The reply to a call of which nothing is known but its id.
    #[must_use]
    pub fn unknown(run: RunId, error: CallError) -> Self {
        Self { facts: Facts::new(run), result: Err(error) }
    }
}

impl Facts {
    fn new(run: RunId) -> Self {
        Self {
            run,
            queue_time: Duration::ZERO,
            mode: None,
            artifact: None,
            policy: None,
            policy_set: None,
            terms: None,
            ignored_context: Vec::new(),
            warm: false,
            draining: false,
        }
    }
}

impl Dispatcher {
    /// A dispatcher that decides by `policies` and executes by `executors`, and
    /// keeps up to `artifact_cache` bytes of executables.
    #[must_use]
    pub fn new(
        policies: Arc<PolicyStore>,
        admission: Admission,
        executors: impl Into<Executors>,
        artifact_cache: u64,
    ) -> Self {
        let (artifacts, executors) = (Store::new(artifact_cache), executors.into());
        let instances = Instances::new(executors.clone(), admission.clone(), Arc::clone(&policies));
        Self { policies, artifacts, admission, executors, instances }
    }

    /// What runs and what waits.
    #[must_use]
    pub fn load(&self) -> Load {
        self.admission.load()
    }

    /// What is held of executables.
    #[must_use]
    pub fn artifacts_held(&self) -> Held {
        self.artifacts.held()
    }

    /// How many services there are.
    #[must_use]
    pub fn instances(&self) -> instances::Count {
        self.instances.count()
    }

    /// How many ended runs can't be removed yet.
    #[must_use]
    pub fn quarantined(&self) -> usize {
        self.executors.quarantined()
    }

    /// Takes one call to its reply. It is stopped through its context's signal;
    /// dropping the future also ends the run, but then nobody learns how.
    pub async fn dispatch(&self, call: Result<Call, FormError>, context: Context) -> Reply {
        let mut facts = Facts::new(context.run);
        facts.policy_set = Some(self.policies.current().digest);
        let stop = context.stop.clone();
        let result = match call {
            Ok(call) => self.decide_by_current(call, context, &mut facts).await,
            Err(malformed) => Err(malformed.into()),
        };
        facts.draining = stop.is_stopped_by_service();
        Reply { facts, result }
    }

    /// Decides by the policies in force, and again when the launcher has newer ones.
    async fn decide_by_current(
        &self,
        mut call: Call,
        mut context: Context,
        facts: &mut Facts,
    ) -> Result<Finished, CallError> {
        facts.ignored_context = std::mem::take(&mut call.ignored_context);
        let mut artifact = None;
        for _ in 0..STALE_RETRIES {
            let policies = self.policies.current();
            match self.steps(&policies, &mut call, &mut artifact, &mut context, facts).await {
                Err(CallError::Execute(ExecuteError::Refused(Refusal::StalePolicy))) => {
                    let executor = self.executors.of(facts.mode.unwrap_or(Mode::Jail));
                    executor.await_policies(|| self.policies.current().digest).await;
                }
                result => return result,
            }
        }
        let policies = self.policies.current();
        self.steps(&policies, &mut call, &mut artifact, &mut context, facts).await
    }

    /// policy → artifact → admission → execute → outcome.
    async fn steps(
        &self,
        policies: &PolicySet,
        call: &mut Call,
        artifact: &mut Option<Artifact>,
        context: &mut Context,
        facts: &mut Facts,
    ) -> Result<Finished, CallError> {
        facts.policy_set = Some(policies.digest);
        let policy = rules::choose(policies, call)?;
        facts.policy = Some((policy.id.policy.clone(), policy.digest));
        let terms = rules::decide(call, policy)?;
        facts.mode = Some(terms.mode);
        facts.terms = Some(terms);
        if policy.protocol == Protocol::Exec {
            // There is nobody to take it.
            let names = std::mem::take(&mut call.metadata).into_keys();
            facts.ignored_context.extend(names.map(|name| format!("{}{name}", metadata::PREFIX)));
        }

        let artifact = self.resolve(call, policy, terms.mode, artifact, facts).await?;
        give_back(call, &artifact, context.reservation.as_mut());

        let permit = self.admit(call, policy, terms, context, facts).await?;

        match policy.protocol {
            Protocol::Exec => {
                let (call, context) = (&*call, &*context);
                let invocation =
                    || invocation(call, policies.digest, policy, terms, artifact.clone(), context);
                self.run(invocation, terms, permit, context, facts).await
            }
            Protocol::Grpc => {
                let ask = ask(call, policies.digest, policy, terms, artifact, context);
                self.serve(ask, facts).await
            }
        }
    }

    /// Runs a program for this one call. The invocation is made anew for each try.
    async fn run(
        &self,
        invocation: impl Fn() -> Invocation + Send,
        terms: Terms,
        permit: Permit,
        context: &Context,
        facts: &Facts,
    ) -> Result<Finished, CallError> {
        let executor = self.executors.of(terms.mode);
        let mut evicted = 0;
        let executed = loop {
            let (stop, sink) = (context.stop.clone(), context.sink.clone());
            match executor.execute(invocation(), stop, sink).await {
                Err(error) if self.instances.make_room_for(&error, &mut evicted).await => {}
                executed => break executed,
            }
        };
        let remains = match &executed {
            Ok(outcome) => outcome.quarantined,
            Err(error) => matches!(error, ExecuteError::Stuck(_)),
        };
        if remains {
            executor.keep_until_released(facts.run, Box::new(permit.quarantine()));
        }
        let outcome = executed?;
        let (output, output_fits) = exec::output(&outcome.stdout, terms.output);
        Ok(Finished { outcome, output: Some(output), output_fits, service: None })
    }

    /// Has a service answer the call.
    async fn serve(&self, ask: Ask, facts: &mut Facts) -> Result<Finished, CallError> {
        let begun = Instant::now();
        let served = self.instances.serve(ask).await;
        if served.is_err() {
            // All that it came to was waiting for an instance.
            facts.queue_time += begun.elapsed();
        }
        let Served { outcome, instance, warm, answer } = served?;
        facts.warm = warm;
        let (output, answer) = match answer {
            Ok(Answered { status, message, output }) => {
                let output = (status.code == 0).then(|| grpc::output(output.as_deref(), &message));
                (output, Ok(status))
            }
            Err(why) => (None, Err(why)),
        };
        let service = Some(ByService { instance, answer });
        Ok(Finished { outcome, output, output_fits: true, service })
    }

    /// Finds the executable and checks it against the policy. It is in `found`
    /// already when the call is decided again.
    async fn resolve(
        &self,
        call: &mut Call,
        policy: &Policy,
        mode: Mode,
        found: &mut Option<Artifact>,
        facts: &mut Facts,
    ) -> Result<Artifact, CallError> {
        let rules = &policy.artifacts;
        let limit = policy.limits.artifact_size;
        // Without an image of its own a container has the root that a jail would have.
        let like = match mode {
            Mode::Container if policy.container.image.is_empty() => Mode::Jail,
            mode => mode,
        };
        let root = |kind: &elf::Executable| {
            artifact::check_root(kind, like, &policy.filesystem, &rules.interpreters)
        };
        let held = match (found.take(), &mut call.source) {
            (Some(artifact), _) => artifact,
            (None, Source::Registered) => return Err(CallError::service_not_found(call)),
            (None, Source::Uri(uri)) => {
                let scheme = uri.split(':').next().unwrap_or_default();
                return Err(CallError::Unimplemented(format!("fetching {scheme:?} artifacts")));
            }
            (None, Source::Held(digest)) => {
                facts.artifact = Some(*digest);
                artifact::check_digest(*digest, call.digest, &rules.digests)?;
                let held = self.artifacts.get(&call.namespace, *digest);
                held.ok_or(ArtifactError::Missing(*digest))?
            }
            (None, Source::Inline(bytes)) => {
                let bytes = std::mem::take(bytes);
                if bytes.is_empty() {
                    return Err(ArtifactError::Empty.into());
                }
                artifact::check_size(bytes.len() as u64, limit)?;
                let sealed = call.sealed.take();
                let digest = match &sealed {
                    Some(sealed) => sealed.digest,
                    None => artifact::digest_of(&bytes).await?,
                };
                facts.artifact = Some(digest);
                artifact::check_digest(digest, call.digest, &rules.digests)?;
                let kind = elf::inspect(&bytes).map_err(ArtifactError::from)?;
                root(&kind)?;
                let content = match sealed {
                    Some(sealed) => Content::Sealed(sealed.memory, bytes.len() as u64),
                    None => Content::Bytes(bytes),
                };
                self.artifacts.put(&call.namespace, digest, kind, content).await?
            }
        };
        facts.artifact = Some(held.digest);
        artifact::check_size(held.size, limit)?;
        artifact::check_digest(held.digest, call.digest, &rules.digests)?;
        root(&held.kind)?;
        *found = Some(held.clone());
        Ok(held)
    }

    async fn admit(
        &self,
        call: &Call,
        policy: &Policy,
        terms: Terms,
        context: &mut Context,
        facts: &mut Facts,
    ) -> Result<Permit, CallError> {
        // A service's memory is its instance's, whose share is another.
        let memory = match policy.protocol {
            Protocol::Exec => terms.memory,
            Protocol::Grpc => Limit::At(0),
        };
        let ask = admission::Ask {
            namespace: &call.namespace,
            rules: &policy.admission,
            memory,
            deadline: context.deadline,
        };
        let begun = Instant::now();
        let admitted = self.admission.admit(ask, &mut context.stop).await;
        facts.queue_time += begun.elapsed();
        Ok(admitted?)
    }
}

/// With the executable in the store, the request's own memory is needed for its
/// input only.
fn give_back(call: &Call, artifact: &Artifact, reservation: Option<&mut Reservation>) {
    let input = call.input.as_ref().map_or(0, |input| input.value.len() as u64);
    let executable = if artifact.stored { 0 } else { artifact.size };
    if let Some(reservation) = reservation {
        reservation.shrink_to(input + executable);
    }
}

fn invocation(
    call: &Call,
    policy_set: Digest,
    policy: &Policy,
    terms: Terms,
    artifact: Artifact,
    context: &Context,
) -> Invocation {
    Invocation {
        run: context.run,
        policy_set,
        template: policy.id.clone(),
        mode: terms.mode,
        namespace: call.namespace.to_string(),
        executable: artifact.memory,
        executable_size: artifact.size,
        argv: exec::argv(call, policy.argv, &artifact.kind),
        interpreter: artifact.kind.interpreter().map(str::to_owned),
        environment: exec::environment(call, policy),
        input: exec::stdin(call),
        timeout: terms.timeout,
        deadline: context.deadline,
        memory: call.limits.memory,
        cpus: call.limits.cpus,
        output_limit: policy.limits.output,
        stderr_limit: policy.limits.stderr,
    }
}

fn ask(
    call: &Call,
    policy_set: Digest,
    policy: &Policy,
    terms: Terms,
    artifact: Artifact,
    context: &Context,
) -> Ask {
    let plain = terms.mode == policy.mode
        && (call.limits.memory, call.limits.cpus) == (None, None)
        && call.args.is_empty()
        && call.env.is_empty();
    let shape = Shape {
        mode: terms.mode,
        memory: call.limits.memory,
        cpus: call.limits.cpus,
        argv: grpc::argv(&call.args, &artifact.kind),
        environment: grpc::environment(call, policy),
    };
    Ask {
        key: Key {
            namespace: call.namespace.clone(),
            policy: (policy.id.clone(), policy.digest),
            artifact: artifact.digest,
        },
        recipe: Recipe {
            shape,
            plain,
            policy_set,
            interpreter: artifact.kind.interpreter().map(str::to_owned),
            executable: artifact.memory,
            executable_size: artifact.size,
            memory: terms.memory,
            cpus: terms.cpus,
            stderr_limit: policy.limits.stderr,
            patience: policy.admission.queue_timeout,
        },
        rules: policy.instances.clone(),
        pinned: policy.artifacts.digests.contains(&artifact.digest),
        call: Unary {
            service: call.service.to_string(),
            method: call.method.to_string(),
            message: exec::stdin(call),
            metadata: metadata::headers(&call.metadata),
            end_by: None,
            limit: 0,
        },
        timeout: terms.timeout,
        deadline: context.deadline,
        stop: context.stop.clone(),
        output_limit: policy.limits.output,
    }
}
