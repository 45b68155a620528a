//! The methods of `CollectiveDispatcher`.

use std::sync::Arc;

use prost::Message as _;
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use super::{
    connections::Caller,
    convert::{self, Summary, reply},
    deadline,
    layers::{
        gate::Ticket,
        receive::{Arrival, Lifted, Received},
        under_way::AnswerMemory,
    },
    metrics::Metrics,
};
use crate::{
    admission::bytes::ByteBudget,
    audit::{self, Record},
    call::Sealed,
    dispatch::{Context, Dispatcher, Reply},
    execute::{
        Outcome,
        stop::{StopHandle, StopSignal},
    },
    names::RunId,
    wire::{self, collective_dispatcher_server::CollectiveDispatcher, serve_request::ServiceDef},
};

/// Bytes of each of a caller's names that the audit record is made from.
const NAME_MAX: usize = 512;

/// Answers calls.
#[derive(Debug)]
pub struct Handler {
    dispatcher: Arc<Dispatcher>,
    metrics: Metrics,
    bytes: ByteBudget,
    executor_id: String,
    /// Stops all calls at the end of the drain.
    stop_all: Arc<StopHandle>,
}

impl Handler {
    /// A handler that passes calls to `dispatcher`, counts them in `metrics` and
    /// their answers in `bytes`, and stops them all by `stop_all`.
    #[must_use]
    pub fn new(
        dispatcher: Arc<Dispatcher>,
        metrics: Metrics,
        bytes: ByteBudget,
        executor_id: String,
        stop_all: Arc<StopHandle>,
    ) -> Self {
        Self { dispatcher, metrics, bytes, executor_id, stop_all }
    }
}

#[tonic::async_trait]
impl CollectiveDispatcher for Handler {
    async fn serve(
        &self,
        request: Request<wire::ServeRequest>,
    ) -> Result<Response<wire::ServeResponse>, Status> {
        let run = RunId::random()
            .map_err(|error| Status::internal(format!("no run id could be made: {error}")))?;
        // Dropped with this future when the caller goes away, and then it stops the run.
        let caller = StopHandle::new();
        let context = self.context(run, &request, &caller);
        let ticket = request.extensions().get::<Ticket>().cloned();
        let record = named(run, &request);

        // A task of its own: it sees the run to its end, whatever becomes of us.
        let dispatcher = Arc::clone(&self.dispatcher);
        let executor_id = self.executor_id.clone();
        let metrics = self.metrics.clone();
        let lifted = request.extensions().get::<Lifted>().cloned();
        let mut request = request.into_inner();
        let mut sealed = None;
        if let Some(lifted) = lifted {
            request.service_def = Some(ServiceDef::ServiceBinary(lifted.binary));
            sealed = lifted.sealed;
        }
        let task = tokio::spawn(async move {
            let (message, summary, record) =
                answer(&dispatcher, request, sealed, context, record, &executor_id).await;
            // Before the answer: whoever has it finds the call on record.
            audit::record(&record);
            metrics.count(&record);
            drop(ticket);
            (message, summary)
        });
        let joined = task.await;
        caller.disarm();
        let (message, summary) = joined.unwrap_or_else(|panic| {
            tracing::error!(%run, %panic, "a call's task failed");
            self.failed(run)
        });
        let memory = self.bytes.hold(message.encoded_len() as u64);
        let mut response = respond(message, &summary, Some(run));
        response.extensions_mut().insert(AnswerMemory::new(memory));
        Ok(response)
    }

    async fn connect(
        &self,
        _: Request<wire::ConnectRequest>,
    ) -> Result<Response<wire::ConnectResponse>, Status> {
        let summary = reply::not_built("Connect");
        let message = wire::ConnectResponse {
            status: Some(reply::status(&summary)),
            ..wire::ConnectResponse::default()
        };
        Ok(respond(message, &summary, None))
    }

    async fn dispatch(
        &self,
        _: Request<wire::DispatchRequest>,
    ) -> Result<Response<wire::DispatchResponse>, Status> {
        let summary = reply::not_built("Dispatch");
        let message = wire::DispatchResponse {
            status: Some(reply::status(&summary)),
            ..wire::DispatchResponse::default()
        };
        Ok(respond(message, &summary, None))
    }
}

impl Handler {
    fn context<T>(&self, run: RunId, request: &Request<T>, caller: &StopHandle) -> Context {
        let extensions = request.extensions();
        let arrival = extensions.get::<Arrival>().map_or_else(Instant::now, |arrival| arrival.0);
        Context {
            run,
            deadline: deadline::end_by(arrival, request.metadata()),
            stop: StopSignal::new(caller, &self.stop_all),
            sink: None,
            reservation: extensions.get::<Received>().and_then(Received::take),
        }
    }

    /// What is said of a call whose task panicked.
    fn failed(&self, run: RunId) -> (wire::ServeResponse, Summary) {
        let error = crate::dispatch::CallError::Internal("its task ended early".to_owned());
        convert::response(Reply::unknown(run, error), &self.executor_id)
    }
}

async fn answer(
    dispatcher: &Dispatcher,
    request: wire::ServeRequest,
    sealed: Option<Sealed>,
    context: Context,
    mut record: Record,
    executor_id: &str,
) -> (wire::ServeResponse, Summary, Record) {
    let mut call = convert::call(request);
    if let Ok(call) = &mut call {
        call.sealed = sealed;
        record.labels.clone_from(&call.labels);
    }
    let reply = dispatcher.dispatch(call, context).await;
    if let Ok(finished) = &reply.result {
        measured(&mut record, &finished.outcome);
        let instance = finished.service.as_ref().and_then(|service| service.instance);
        record.instance = instance.map(|run| run.to_string()).unwrap_or_default();
        record.warm = reply.facts.warm;
    }
    let (message, summary) = convert::response(reply, executor_id);
    if let Some(report) = &message.report {
        reported(&mut record, report);
    }
    record.verdict = reply::verdict_name(summary.verdict);
    record.code = summary.code.as_str_name();
    record.reason = summary.reason.unwrap_or_default();
    (message, summary, record)
}

fn respond<T>(message: T, summary: &Summary, run: Option<RunId>) -> Response<T> {
    let mut response = Response::new(message);
    response.extensions_mut().insert(reply::Trailers::of(summary, run));
    response
}

/// The audit record's beginning: who asks for what, well formed or not.
fn named(run: RunId, request: &Request<wire::ServeRequest>) -> Record {
    let message = request.get_ref();
    let short = |text: &str| text.chars().take(NAME_MAX).collect::<String>();
    let peer = request.extensions().get::<Caller>().map(|caller| caller.peer.to_string());
    Record {
        run_id: run.to_string(),
        peer: peer.unwrap_or_default(),
        namespace: short(&message.namespace),
        service: message.service.as_ref().map(|s| short(&s.service_name)).unwrap_or_default(),
        method: short(&message.method_name),
        request_id: message.options.as_ref().map(|o| short(&o.request_id)).unwrap_or_default(),
        ..Record::default()
    }
}

fn measured(record: &mut Record, outcome: &Outcome) {
    record.exit_code = outcome.exit_code;
    record.signal = outcome.signal;
    record.denied_syscall.clone_from(&outcome.denied_syscall);
    record.setup = outcome.setup;
    record.wall = outcome.wall;
    record.cpu = outcome.user + outcome.system;
    record.memory_peak = outcome.memory_peak;
}

fn reported(record: &mut Record, report: &wire::ExecutionReport) {
    record.policy.clone_from(&report.policy);
    record.policy_digest.clone_from(&report.policy_digest);
    record.artifact.clone_from(&report.artifact_digest);
    if report.mode() != wire::ExecutionMode::Unspecified {
        let name = report.mode().as_str_name();
        record.mode = name.trim_start_matches("EXECUTION_MODE_").to_lowercase();
    }
    let queue = report.queue_time.and_then(|queue| queue.try_into().ok());
    record.queue = queue.unwrap_or_default();
}
