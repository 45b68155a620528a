//! Messages to bytes and back: between server and launcher, and on the wire.

use std::{fmt::Debug, hint::black_box, time::Duration};

use bytes::Bytes;
use criterion::{Criterion, Throughput};
use dispatcher::{
    jail::{
        message::{End, FromLauncher, FromServer, Launch, Oom, WaitStatus},
        plan::{Control, Mode, TemplateId},
    },
    names::{Digest, RunId},
    units::MilliCpus,
    wire::{
        ExecutionReport, ServeRequest, ServeResponse, ServiceTypeRef, Status,
        serve_request::ServiceDef,
    },
};
use prost::Message;
use serde::{Serialize, de::DeserializeOwned};

/// A launch and its end, in postcard.
pub fn launcher(criterion: &mut Criterion) {
    let run = RunId::random().expect("random bytes");
    postcard(criterion, "launch", &FromServer::Launch(launch(run)));
    postcard(criterion, "ended", &FromLauncher::Ended { run, end: Box::new(end()) });
}

fn postcard<T: Serialize + DeserializeOwned + Debug>(
    criterion: &mut Criterion,
    name: &str,
    message: &T,
) {
    let bytes = postcard::to_stdvec(message).expect("it can be encoded");
    criterion.bench_function(&format!("launcher/{name}/encode"), |bencher| {
        bencher.iter(|| postcard::to_stdvec(black_box(message)).expect("it can be encoded"));
    });
    criterion.bench_function(&format!("launcher/{name}/decode"), |bencher| {
        bencher.iter(|| postcard::from_bytes::<T>(black_box(&bytes)).expect("as encoded"));
    });
}

fn launch(run: RunId) -> Launch {
    Launch {
        run,
        policy_set: Digest::of(b"policies"),
        template: TemplateId { policy: "default".into(), variant: 0 },
        mode: Mode::Jail,
        namespace: "demo".into(),
        timeout: Some(Duration::from_secs(30)),
        memory: Some(64 << 20),
        cpus: Some(MilliCpus(500)),
        executable_size: 1 << 20,
        interpreter: None,
        argc: 4,
        envc: 12,
    }
}

fn end() -> End {
    End {
        status: WaitStatus::Exited(0),
        stopped: None,
        oom: Oom::None,
        denied_syscall: None,
        refused_syscalls: vec!["socket".into()],
        enforced: vec![Control::NsUser, Control::NsMount, Control::NsPid, Control::NsNet],
        setup: Duration::from_micros(700),
        wall: Duration::from_micros(400),
        user: Duration::from_micros(100),
        system: Duration::from_micros(300),
        memory_peak: 300 << 10,
        pids_peak: 1,
        runtime: None,
        lost: None,
        quarantined: false,
    }
}

/// A call with a program of two sizes, and a reply with as much output, in protobuf.
pub fn wire(criterion: &mut Criterion) {
    for (size, name) in [(1 << 10, "1KiB"), (1 << 20, "1MiB")] {
        prost(criterion, &format!("wire/request/{name}"), size, &request(size));
        prost(criterion, &format!("wire/response/{name}"), size, &response(size));
    }
}

fn prost<T: Message + Default>(criterion: &mut Criterion, name: &str, size: usize, message: &T) {
    let bytes = Bytes::from(message.encode_to_vec());
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(size as u64));
    group.bench_function("encode", |bencher| {
        bencher.iter(|| black_box(message).encode_to_vec());
    });
    group.bench_function("decode", |bencher| {
        // As it arrives: what is large stays a slice of it.
        bencher.iter(|| T::decode(black_box(bytes.clone())).expect("as encoded"));
    });
    group.finish();
}

fn request(size: usize) -> ServeRequest {
    ServeRequest {
        namespace: "default".into(),
        service: Some(ServiceTypeRef { namespace: String::new(), service_name: "greeter".into() }),
        method_name: "greet".into(),
        service_def: Some(ServiceDef::ServiceBinary(vec![7; size].into())),
        ..ServeRequest::default()
    }
}

fn response(size: usize) -> ServeResponse {
    let said = Status { message: "x".repeat(size), ..Status::default() };
    let output = prost_types::Any {
        type_url: "type.googleapis.com/collector.Status".into(),
        value: said.encode_to_vec(),
    };
    let enforced = ["ns_user", "ns_mount", "ns_pid", "seccomp", "memory"];
    let report = ExecutionReport {
        enforced: enforced.map(String::from).to_vec(),
        artifact_digest: Digest::of(b"program").to_string(),
        ..ExecutionReport::default()
    };
    ServeResponse {
        status: Some(Status::default()),
        output: Some(output),
        executor_id: "bench".into(),
        report: Some(report),
    }
}
