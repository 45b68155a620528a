//! Roots of containers: the host's, a directory, an image, and what is mounted into them.

use std::{fs, os::unix::fs::PermissionsExt as _};

use dispatcher::wire::status::Code;

use crate::{
    common::{Dispatcher, dispatcher::container, docker::needs_docker, host},
    dispatcher,
};

#[test]
fn the_policys_image_is_used_as_it_is() {
    let docker = needs_docker!();
    let image = docker.image(
        &[("tmp/", ""), ("greeting", "from the image\n")],
        &[
            "ENV FROM_IMAGE=1",
            "USER 0",
            "WORKDIR /nowhere",
            "ENTRYPOINT [\"/bin/false\"]",
            "CMD [\"x\"]",
        ],
    );
    let policy = container(&format!("[container]\nimage = {:?}\n", image.name));
    let own = Dispatcher::start([("image", policy)]);
    let reply =
        own.run("image", "act", &["cat", "/greeting", "env", "write", "/tmp/file", "x"]).ok();
    let text = reply.text();
    assert!(text.starts_with("from the image\n"), "{text}");
    assert!(!text.contains("FROM_IMAGE"), "the environment is the policy's: {text}");
    assert!(text.contains("/tmp/file=ok"), "{text}");
    let facts = own.run("image", "facts", &["identity", "process"]).ok().facts();
    assert_eq!((facts.one("uid"), facts.one("cwd")), ("65534 65534 65534", "/"));
}

#[test]
fn the_hosts_root_runs_dynamic_programs() {
    let _docker = needs_docker!();
    let args = [
        "print",
        "by the loader\n",
        "write",
        "/usr/file",
        "x",
        "ls",
        "/home",
        "cat",
        "/etc/shadow",
    ];
    let reply = dispatcher().run("host-root", "act-dynamic", &args).ok();
    let text = reply.text();
    assert!(text.starts_with("by the loader\n"), "{text}");
    let facts = reply.facts();
    assert_eq!(facts.one("/usr/file"), "EROFS");
    assert_eq!((facts.one("/home"), facts.one("/etc/shadow")), ("ENOENT", "ENOENT"));
    // Without it there is no loader.
    let reply = dispatcher().run("box", "act-dynamic", &[]);
    reply.refused(Code::InvalidArgument, "loader_missing");
}

#[test]
fn binds_are_seen_read_only_or_refused() {
    let _docker = needs_docker!();
    let directory = tempfile::tempdir().unwrap();
    let source = |name: &str, mode| {
        let path = directory.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), "shown\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let (open, closed) = (source("open", 0o755), source("closed", 0o700));
    let bind = |source: &str| {
        let bind = format!("{{ source = {source:?}, target = \"/data\" }}");
        container(&format!("[filesystem]\nbind = [{bind}]\n"))
    };
    let own = Dispatcher::start([
        ("open", bind(&open)),
        ("closed", bind(&closed)),
        ("absent", bind("/nonexistent/source")),
    ]);
    let reply = own.run("open", "act", &["cat", "/data/file", "write", "/data/new", "x"]).ok();
    assert_eq!(reply.text(), "shown\n/data/new=EROFS\n");
    for (namespace, path) in [("closed", &*closed), ("absent", "/nonexistent/source")] {
        let reply = own.run(namespace, "act", &["print", "no"]);
        let reply = reply.refused(Code::FailedPrecondition, "control_unavailable");
        assert!(reply.message.contains(path), "{namespace}: {}", reply.summary());
    }
}

/// What Docker mounts by itself has a place in a directory that has none, and what the
/// policy shows there comes before.
#[test]
fn a_directory_is_a_root() {
    let _docker = needs_docker!();
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    for inside in ["etc/deep", "run/lock", "run/dispatcher", "data"] {
        fs::create_dir_all(root.join(inside)).unwrap();
    }
    for (file, content) in [("etc/name", "of it\n"), ("etc/hosts", "its own\n"), ("data/x", "x\n")]
    {
        fs::write(root.join(file), content).unwrap();
    }
    let servers = directory.path().join("servers");
    fs::write(&servers, "nameserver 192.0.2.1\n").unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let before = host::files_below(&root).unwrap();
    let bind = format!(
        "bind = [{{ source = {servers:?}, target = \"/etc/resolv.conf\" }}]\n[network]\nmode = \"host\"\n"
    );
    let own = Dispatcher::start([
        ("directory", container(&format!("[filesystem]\nroot = {root:?}\n"))),
        ("bound", container(&format!("[filesystem]\nroot = {root:?}\n{bind}"))),
        ("empty", container(&format!("[filesystem]\n{bind}"))),
    ]);
    let cat =
        ["cat", "/etc/name", "cat", "/etc/hosts", "cat", "/etc/resolv.conf", "cat", "/data/x"];
    let text = |namespace: &str| own.run(namespace, "act", &cat).ok().text();
    assert_eq!(text("directory"), "of it\nits own\nx\n");
    assert_eq!(text("bound"), "of it\nits own\nnameserver 192.0.2.1\nx\n");
    assert_eq!(
        text("empty"),
        "/etc/name=ENOENT\n127.0.0.1 localhost\n::1 localhost\nnameserver 192.0.2.1\n/data/x=ENOENT\n"
    );
    let facts = own.run("directory", "act", &["ls", "/run", "write", "/etc/new", "x"]).ok().facts();
    assert_eq!(
        (facts.set("/run"), facts.one("/etc/new")),
        (["dispatcher", "lock"].into(), "EROFS")
    );
    // Not a file was made in it to mount at.
    assert_eq!(host::files_below(&root).unwrap(), before);
}

/// Whatever an image has in /etc, the host's name servers aren't shown in it either.
#[test]
fn an_image_shows_nothing_of_the_hosts_etc() {
    let docker = needs_docker!();
    let image = docker.image(&[("tmp/", ""), ("etc/resolv.conf", "the image's\n")], &[]);
    let own = Dispatcher::start([(
        "image",
        container(&format!("[container]\nimage = {:?}\n", image.name)),
    )]);
    let cat = ["cat", "/etc/hosts", "cat", "/etc/resolv.conf"];
    let text = own.run("image", "act", &cat).ok().text();
    assert_eq!(text, "127.0.0.1 localhost\n::1 localhost\n");
}

/// The filter lies over init as well.
#[test]
fn a_profile_without_what_init_needs_is_refused_by_name() {
    let _docker = needs_docker!();
    let own = Dispatcher::start([("strict", container("[seccomp]\ndeny = [\"signalfd4\"]\n"))]);
    let reply = own.run("strict", "act", &["print", "no"]);
    let reply = reply.refused(Code::FailedPrecondition, "control_unavailable");
    assert_eq!(reply.detail("control"), "seccomp");
    assert!(reply.message.contains("signalfd4"), "{}", reply.summary());
}
