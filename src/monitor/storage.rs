//! The state directory: made by the monitor, because the server may not.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, fchown},
    path::Path,
};

/// Makes `directory` where it is not there, and gives it to the server's user
/// `id` where there is one. A directory that holds something is never given
/// away: it may not be meant. Says so if the server can't use it.
///
/// # Errors
/// Those of mkdir(2), open(2) and fchown(2), with the path.
pub fn prepare(directory: &Path, id: Option<u32>) -> io::Result<Option<String>> {
    give(directory, id)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", directory.display())))
}

fn give(directory: &Path, id: Option<u32>) -> io::Result<Option<String>> {
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let Some(id) = id else { return Ok(None) };
    let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
    let opened = File::options().read(true).custom_flags(flags).open(directory)?;
    let owner = opened.metadata()?.uid();
    if owner == id {
        return Ok(None);
    }
    let ours = owner == rustix::process::geteuid().as_raw();
    if ours && fs::read_dir(directory)?.next().is_none() {
        fchown(&opened, Some(id), Some(id))?;
        return Ok(None);
    }
    Ok(Some(format!(
        "{0} belongs to uid {owner}, and the server can't write there; \
         write `chown -R {id}:{id} {0}`, or another directory in state.dir",
        directory.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_made_and_private() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("a/b");
        assert_eq!(prepare(&directory, None).unwrap(), None);
        assert_eq!(fs::metadata(&directory).unwrap().mode() & 0o7777, 0o700);
        assert_eq!(prepare(&directory, None).unwrap(), None);
    }

    #[test]
    fn what_holds_something_is_not_given_away() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("not here: only root gives anything away");
            return;
        }
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("state");
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("file"), "").unwrap();
        let warning = prepare(&directory, Some(2_065_535)).unwrap().unwrap();
        assert!(warning.contains("chown"), "{warning}");
        assert_eq!(fs::metadata(&directory).unwrap().uid(), 0);

        fs::remove_file(directory.join("file")).unwrap();
        assert_eq!(prepare(&directory, Some(2_065_535)).unwrap(), None);
        assert_eq!(fs::metadata(&directory).unwrap().uid(), 2_065_535);
    }
}
