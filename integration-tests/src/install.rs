//! Puts the binaries and the vhost-user discovery files where users, QEMU and libvirt look for
//! them.

use crate::artifacts::{Artifact, Artifacts};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// All of them in one folder: the launcher finds the others beside its own file.
const PROGRAMS: [Artifact; 6] = [
    Artifact::Bulkhead,
    Artifact::Supervisor,
    Artifact::Vmm,
    Artifact::VhostUserBlk,
    Artifact::VhostUserNet,
    Artifact::ImageTool,
];
const PROGRAM_FOLDER: &str = "libexec/bulkhead";
/// Those that people start by hand: links in `bin` lead to them.
const COMMANDS: [Artifact; 3] = [Artifact::Bulkhead, Artifact::VhostUserBlk, Artifact::VhostUserNet];
/// Where QEMU's interoperability specification has them (docs/interop/vhost-user.json).
const DISCOVERY_FOLDER: &str = "share/qemu/vhost-user";
const DISCOVERY: [(&str, Artifact, &str); 2] = [
    (
        "50-bulkhead-blk.json",
        Artifact::VhostUserBlk,
        include_str!("../../vhost-blk/50-bulkhead-blk.json"),
    ),
    (
        "50-bulkhead-net.json",
        Artifact::VhostUserNet,
        include_str!("../../vhost-net/50-bulkhead-net.json"),
    ),
];

/// Where to.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where the files will be used.
    pub prefix: PathBuf,
    /// A folder that stands for the root until then, as packages are made.
    pub destdir: Option<PathBuf>,
}

impl Place {
    /// The file `inside` the prefix, as it is written now.
    fn now(&self, inside: &str) -> Result<PathBuf> {
        let later = self.prefix.join(inside);
        let Some(destdir) = &self.destdir else {
            return Ok(later);
        };
        // An absolute path would replace what it is joined to.
        Ok(destdir.join(later.strip_prefix("/")?))
    }
}

/// Installs everything and returns the files in their order.
///
/// # Errors
/// The prefix is not absolute, a binary is missing, or a file cannot be written.
pub fn install(artifacts: &Artifacts, place: &Place) -> Result<Vec<PathBuf>> {
    ensure!(
        place.prefix.is_absolute(),
        "the prefix {} is not absolute",
        place.prefix.display()
    );
    let mut files = Vec::new();
    for program in PROGRAMS {
        let file = place.now(&format!("{PROGRAM_FOLDER}/{}", program.name()))?;
        let content = fs::read(artifacts.path(program)?)?;
        write(&file, &content, 0o755)?;
        files.push(file);
    }
    for command in COMMANDS {
        let link = place.now(&format!("bin/{}", command.name()))?;
        make_room(&link)?;
        symlink(Path::new("..").join(PROGRAM_FOLDER).join(command.name()), &link)
            .with_context(|| format!("cannot make {}", link.display()))?;
        files.push(link);
    }
    for (name, program, content) in DISCOVERY {
        let mut about: Value = serde_json::from_str(content)?;
        let binary = place.prefix.join(PROGRAM_FOLDER).join(program.name());
        about["binary"] = Value::from(binary.to_str().context("a prefix that is not UTF-8")?);
        let file = place.now(&format!("{DISCOVERY_FOLDER}/{name}"))?;
        write(&file, format!("{about:#}\n").as_bytes(), 0o644)?;
        files.push(file);
    }
    Ok(files)
}

fn write(file: &Path, content: &[u8], mode: u32) -> Result<()> {
    // Beside and then over it: what runs from the old file goes on.
    let new = file.with_extension("new");
    make_room(&new)?;
    let failed = || format!("cannot write {}", file.display());
    fs::write(&new, content).with_context(failed)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(mode)).with_context(failed)?;
    fs::rename(&new, file).with_context(failed)
}

/// Its folder is there, and it is not.
fn make_room(file: &Path) -> Result<()> {
    let folder = file.parent().context("a file without a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    match fs::remove_file(file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", file.display()))
        }
        _ => Ok(()),
    }
}
