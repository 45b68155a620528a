//! The dispatcher's own images: what of a root isn't shown from the host.
//!
//! A root of the policy's is decided as for a jail (`jail::root`): small things of our own
//! (directories, links, made-up files) go into an image, what is the host's is mounted.
//! Images are imported, which needs no registry, and named by the digest of their content.

use std::{collections::BTreeMap, ffi::OsStr, io, os::unix::ffi::OsStrExt as _};

use crate::{
    jail::blueprint::{BindPiece, Piece},
    names::Digest,
};

/// The place of `protocol::SERVICE_DIRECTORY`.
const SERVICE_PLACE: &str = "run/grpc";

/// The repository of our images, in Docker's words.
const REPOSITORY: &str = "dispatcher/root";

/// An image that can be imported.
#[derive(Debug)]
pub struct OwnImage {
    /// Its name, with a tag that says what is in it.
    pub name: String,
    /// Its files as a tar archive.
    pub archive: Vec<u8>,
}

/// A root in Docker's terms.
#[derive(Debug)]
pub struct ContainerRoot {
    /// What is ours of it.
    pub image: OwnImage,
    /// What is the host's, in the order in which it is to be mounted.
    pub binds: Vec<BindPiece>,
}

impl ContainerRoot {
    /// Divides the pieces of a root; `listens`: of a service's.
    ///
    /// # Errors
    /// A name that no archive takes.
    pub fn of(pieces: Vec<Piece>, listens: bool) -> io::Result<Self> {
        let mut files = Files::default();
        // Where Docker mounts, there has to be a place: it can't make one in a read-only root.
        for place in ["dev", "proc", "sys", "etc", "tmp", "run", "run/dispatcher"] {
            files.directory(place.as_bytes());
        }
        if listens {
            files.directory(SERVICE_PLACE.as_bytes());
        }
        let mut binds = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Directory(path) => files.directory(path.as_bytes()),
                Piece::Symlink { content, path } => {
                    files.add(path.as_bytes(), Entry::Link(content.into_bytes()));
                }
                Piece::File { path, content } => files.add(path.as_bytes(), Entry::File(content)),
                Piece::Bind(bind) => {
                    let place = match bind.directory {
                        true => Entry::Directory,
                        false => Entry::File(Vec::new()),
                    };
                    files.add(bind.target.as_bytes(), place);
                    binds.push(bind);
                }
                // It comes with its call, at a place that every container has.
                Piece::Script { .. } => {}
            }
        }
        let archive = files.archive()?;
        let digest = Digest::of(&archive).to_string();
        let (_, hex) = digest.split_once(':').unwrap_or(("", &digest));
        let name = format!("{REPOSITORY}:{}", &hex[..hex.len().min(32)]);
        Ok(Self { image: OwnImage { name, archive }, binds })
    }
}

enum Entry {
    Directory,
    Link(Vec<u8>),
    File(Vec<u8>),
}

/// By path, so that a directory comes before what is in it and the archive of the same
/// content is always the same.
#[derive(Default)]
struct Files(BTreeMap<Vec<u8>, Entry>);

impl Files {
    fn directory(&mut self, path: &[u8]) {
        self.add(path, Entry::Directory);
    }

    /// What is there already stays.
    fn add(&mut self, path: &[u8], entry: Entry) {
        self.0.entry(path.to_owned()).or_insert(entry);
    }

    fn archive(&self) -> io::Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, entry) in &self.0 {
            let path = OsStr::from_bytes(path);
            let mut header = tar::Header::new_gnu();
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header.set_size(0);
            match entry {
                Entry::Directory => {
                    // What is mounted there has the mode of what was there: runc's doing.
                    header.set_mode(match path.to_str() {
                        Some("tmp") => 0o1777,
                        Some(SERVICE_PLACE) => super::service::MODE,
                        _ => 0o755,
                    });
                    header.set_entry_type(tar::EntryType::Directory);
                    archive.append_data(&mut header, path, io::empty())?;
                }
                Entry::Link(content) => {
                    header.set_mode(0o777);
                    header.set_entry_type(tar::EntryType::Symlink);
                    archive.append_link(&mut header, path, OsStr::from_bytes(content))?;
                }
                Entry::File(content) => {
                    header.set_mode(0o444);
                    header.set_entry_type(tar::EntryType::Regular);
                    header.set_size(content.len() as u64);
                    archive.append_data(&mut header, path, &content[..])?;
                }
            }
        }
        archive.into_inner()
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::CString, io::Read as _, path::PathBuf};

    use super::*;
    use crate::{
        jail::{
            plan::{Bind, Filesystem, Root},
            root::{self, Ownership},
        },
        units::Limit,
    };

    fn entries(archive: &[u8]) -> Vec<(String, tar::EntryType, String)> {
        let mut found = Vec::new();
        for entry in tar::Archive::new(archive).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = entry.path().unwrap().display().to_string();
            let link = entry.link_name().unwrap().map(|link| link.display().to_string());
            let mut content = String::new();
            entry.read_to_string(&mut content).unwrap();
            let path = path.trim_end_matches('/').to_owned();
            found.push((path, entry.header().entry_type(), link.unwrap_or(content)));
        }
        found
    }

    fn of(root: Root, binds: Vec<Bind>) -> ContainerRoot {
        let filesystem = Filesystem { root, tmp: Some(Limit::At(1 << 20)), tmp_exec: false, binds };
        let decided = root::decide(&filesystem, None, Ownership::Docker, false).unwrap();
        ContainerRoot::of(decided.plan.pieces, false).unwrap()
    }

    #[test]
    fn an_empty_root_has_places_to_mount_on_and_nothing_else() {
        let made = of(Root::Empty, vec![]);
        let names: Vec<_> =
            entries(&made.image.archive).into_iter().map(|(path, ..)| path).collect();
        assert_eq!(names, ["dev", "etc", "proc", "run", "run/dispatcher", "sys", "tmp"]);
        let mut archive = tar::Archive::new(&made.image.archive[..]);
        let tmp = archive.entries().unwrap().last().unwrap().unwrap();
        assert_eq!(tmp.header().mode().unwrap(), 0o1777);
        assert!(made.binds.is_empty());
        assert_eq!(made.image.name, of(Root::Empty, vec![]).image.name, "the same each time");
    }

    #[test]
    fn the_hosts_root_is_mounted_and_its_links_are_ours() {
        let made = of(Root::Host, vec![]);
        let found = entries(&made.image.archive);
        assert!(made.binds.iter().any(|bind| bind.target == CString::new("usr").unwrap()));
        let passwd = found.iter().find(|(path, ..)| path == "etc/passwd").unwrap();
        assert!(passwd.2.starts_with("nobody:"));
        for (path, kind, content) in &found {
            let host = PathBuf::from("/").join(path);
            if *kind == tar::EntryType::Symlink {
                assert_eq!(std::fs::read_link(host).unwrap().display().to_string(), *content);
            }
        }
    }

    #[test]
    fn binds_have_their_places() {
        let source = tempfile::tempdir().unwrap();
        std::fs::set_permissions(
            source.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .unwrap();
        let target = PathBuf::from("/srv/deep/data");
        let bind = Bind { source: source.path().to_owned(), target, read_only: true };
        let made = of(Root::Empty, vec![bind.clone()]);
        let names: Vec<_> =
            entries(&made.image.archive).into_iter().map(|(path, ..)| path).collect();
        assert!(names.windows(3).any(|three| three == ["srv", "srv/deep", "srv/deep/data"]));
        assert_eq!(made.binds.len(), 1);
        let writable = Filesystem {
            root: Root::Empty,
            tmp: None,
            tmp_exec: false,
            binds: vec![Bind { read_only: false, ..bind }],
        };
        let refused = root::decide(&writable, None, Ownership::Docker, false).unwrap_err();
        assert!(refused.to_string().contains("Docker can't idmap"), "{refused}");
    }
}
