//! Wrong input, one test each: what the message says, and which field it names.

use super::jails::Place;
use anyhow::{Context, Result, bail, ensure};
use integration_tests::{
    artifacts::Artifact,
    host::Host,
    lent::{NOBODY, become_nobody},
    suite::{Skip, artifact, test},
    tiny::Run,
};
use libtest_mimic::Trial;
use nix::unistd::{Gid, Uid, chown};
use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{
        fs::{FileExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Command,
    thread,
    time::Duration,
};
use vm_spec::control::exit_code;

const DEADLINE: Duration = Duration::from_secs(20);

pub(crate) fn tests() -> Vec<Trial> {
    let mut tests = flags_alone();
    tests.push(test("bad_input::no_kvm", no_kvm));
    tests.push(test("bad_input::kvm_not_permitted", kvm_not_permitted));
    tests.push(test("bad_input::stock_kernel_on_software_kvm", stock_kernel));
    tests.push(test("bad_input::kernel_larger_than_memory", kernel_too_large));
    tests.push(test("bad_input::unknown_key_in_a_file", unknown_key));
    let back_ends: [(&str, u8, Conduct, &[&str]); 3] = [
        (
            "exits_at_once (waits)",
            exit_code::ERROR,
            drop,
            &["disk0", "closed"],
        ),
        (
            "hangs_in_the_handshake (waits)",
            exit_code::ERROR,
            hang,
            &["disk0", "GET_FEATURES"],
        ),
        (
            "offers_no_version_1",
            exit_code::ERROR,
            old,
            &["disk0", "VERSION_1"],
        ),
    ];
    for (name, code, conduct, words) in back_ends {
        tests.push(test(format!("bad_input::back_end_{name}"), move || {
            back_end(conduct, code, words)
        }));
    }
    tests
}

/// Runs `script` as root of a mount namespace of its own; `$@` are the launcher and its flags.
fn in_other_dev(script: &str, words: &[&str]) -> Result<()> {
    Host::need_kvm()?;
    if !Uid::effective().is_root() {
        bail!(Skip("only root can mount over /dev".to_owned()));
    }
    let place = Place::make()?;
    let runtime = tempfile::tempdir()?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]);
    let become_nobody = become_nobody(&place.path("bulkhead"));
    chown(
        runtime.path(),
        Some(Uid::from_raw(NOBODY)),
        Some(Gid::from_raw(NOBODY)),
    )?;
    command
        .arg(become_nobody.get_program())
        .args(become_nobody.get_args());
    let flags = [format!("--kernel={}", place.path("tiny-guest").display())];
    says(Run::by(command, runtime, &flags)?, exit_code::ERROR, words)
}

fn no_kvm() -> Result<()> {
    in_other_dev(
        "mount -t tmpfs none /dev && exec \"$@\"",
        &["no KVM", "/dev/kvm", "cargo demo"],
    )
}

fn kvm_not_permitted() -> Result<()> {
    in_other_dev(
        "mount -t tmpfs none /dev && : > /dev/kvm && chmod 0 /dev/kvm && exec \"$@\"",
        &["KVM is not permitted", "/dev/kvm", "setfacl"],
    )
}

/// The header alone tells a Linux kernel: it is refused before anything is loaded.
fn stock_kernel() -> Result<()> {
    if Host::detect()? != Host::Software {
        bail!(Skip("this host's KVM is no software KVM".to_owned()));
    }
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vmlinuz");
    let mut image = vec![0; 8192];
    image[0x202..0x206].copy_from_slice(b"HdrS");
    fs::write(&path, image)?;
    says(
        Run::with_flags(&[kernel(&path)])?,
        exit_code::ERROR,
        &["boot.kernel", "kvm_pvm", "nested runner"],
    )
}

/// The tiny guest, with 1 GiB of zeroes behind its first segment.
fn kernel_too_large() -> Result<()> {
    Host::need_kvm()?;
    let mut image = fs::read(artifact(Artifact::TinyGuest)?)?;
    // e_phoff and the entries of 56 bytes; p_type 1 is PT_LOAD; p_memsz is at 40.
    let table = usize::try_from(u64::from_le_bytes(*image[32..].first_chunk().context("short")?))?;
    let load = (0..)
        .map(|n| table + n * 56)
        .find(|at| image[*at..at + 4] == [1, 0, 0, 0])
        .context("no PT_LOAD")?;
    image[load + 40..load + 48].copy_from_slice(&(1u64 << 30).to_le_bytes());
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("large");
    fs::write(&path, image)?;
    says(
        Run::with_flags(&[kernel(&path), "--memory=64M".to_owned()])?,
        exit_code::ERROR,
        &["bulkhead: memory: ", "kernel needs guest memory", "more memory"],
    )
}

fn unknown_key() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("vm.toml");
    fs::write(
        &path,
        "cpus = 1\n[boot]\nkernel = \"k\"\n\n[[disk]]\n  pth = \"x\"\n",
    )?;
    let place = format!("{}:6:3", path.display());
    says(
        Run::with_flags(&[path.display().to_string()])?,
        exit_code::USAGE,
        &[&place, "unknown field `pth`", "did you mean 'path'?"],
    )
}

/// What a back end does with its one connection.
type Conduct = fn(UnixStream);

fn hang(mut socket: UnixStream) {
    // Until the front end has had enough.
    let _ = std::io::copy(&mut socket, &mut std::io::sink());
}

/// Answers GET_FEATURES (1) with none; everything else needs no answer.
fn old(mut socket: UnixStream) {
    let mut header = [0; 12];
    while socket.read_exact(&mut header).is_ok() {
        let size = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
        let mut body = vec![0; size as usize];
        if socket.read_exact(&mut body).is_err() {
            return;
        }
        if header[0] == 1 {
            // Version 1, reply; eight bytes.
            let reply = [1u32, 0b101, 8, 0, 0].map(u32::to_le_bytes);
            // A front end that is gone ends the loop.
            let _ = socket.write_all(reply.as_flattened());
        }
    }
}

fn back_end(conduct: Conduct, code: u8, words: &[&str]) -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path)?;
    thread::spawn(move || {
        if let Ok((socket, _)) = listener.accept() {
            conduct(socket);
        }
    });
    let flags = with(format!("--disk=vhost-user={}", path.display()))?;
    says(Run::with_flags(&flags)?, code, words)
}

/// Flags that must fail, with the exit code and what the message must name.
type Bad = (
    &'static str,
    u8,
    fn(&Path) -> Result<Vec<String>>,
    &'static [&'static str],
);

fn flags_alone() -> Vec<Trial> {
    let cases: [Bad; 14] = [
        (
            "initrd_too_large",
            exit_code::ERROR,
            |folder| {
                let path = folder.join("initrd");
                File::create(&path)?.set_len(256 << 20)?;
                let mut flags = with(format!("--initrd={}", path.display()))?;
                flags.push("--memory=64M".to_owned());
                Ok(flags)
            },
            &["boot.initrd: ", "initrd is 268435456 bytes", "more memory"],
        ),
        (
            "backing_file_outside",
            exit_code::ERROR,
            |folder| overlay(folder, &folder.join("outside/base")),
            &["disk[0].path", "outside", "image-folder"],
        ),
        (
            "backing_file_is_a_link_out",
            exit_code::ERROR,
            |folder| {
                let flags = overlay(folder, Path::new("link"))?;
                symlink(folder.join("outside/base"), folder.join("inside/link"))?;
                Ok(flags)
            },
            &["disk[0].path", "'link'", "outside", "image-folder"],
        ),
        (
            "backing_file_below_a_link_out",
            exit_code::ERROR,
            |folder| {
                let flags = overlay(folder, Path::new("sub/base"))?;
                symlink(folder.join("outside"), folder.join("inside/sub"))?;
                Ok(flags)
            },
            &["disk[0].path", "'sub/base'", "outside", "image-folder"],
        ),
        (
            "backing_chain_is_a_loop",
            exit_code::ERROR,
            |folder| {
                let flags = overlay_of(folder, Path::new("loop"), "qcow2")?;
                fs::copy(folder.join("inside/top"), folder.join("inside/loop"))?;
                Ok(flags)
            },
            &["disk[0].path", "longer than 16 images"],
        ),
        (
            "kernel_missing",
            exit_code::ERROR,
            |folder| Ok(vec![kernel(&folder.join("none"))]),
            &["boot.kernel: cannot open", "none", "No such file"],
        ),
        (
            "kernel_truncated",
            exit_code::ERROR,
            |folder| {
                let whole = fs::read(artifact(Artifact::TinyGuest)?)?;
                fs::write(folder.join("short"), &whole[..100])?;
                Ok(vec![kernel(&folder.join("short"))])
            },
            &[
                "boot.kernel: ",
                "cannot be booted",
                "truncated: it has 100 bytes",
                "vmlinux",
            ],
        ),
        (
            "kernel_is_no_kernel",
            exit_code::ERROR,
            |folder| {
                fs::write(folder.join("text"), "no kernel")?;
                Ok(vec![kernel(&folder.join("text"))])
            },
            &[
                "boot.kernel: ",
                "cannot be booted",
                "neither a 64-bit ELF image nor a bzImage",
                "vmlinux",
            ],
        ),
        (
            "disk_missing",
            exit_code::ERROR,
            |folder| {
                with(format!(
                    "--disk=path={},format=raw",
                    folder.join("none").display()
                ))
            },
            &["disk[0].path", "none"],
        ),
        (
            "disk_of_wrong_format",
            exit_code::ERROR,
            |folder| {
                fs::write(folder.join("raw"), [0; 4096])?;
                with(format!(
                    "--disk=path={},format=qcow2",
                    folder.join("raw").display()
                ))
            },
            &["disk[0]", "qcow2"],
        ),
        (
            "disk_that_its_process_refuses",
            exit_code::ERROR,
            |folder| {
                let disk = folder.join("disk");
                let mut create = Command::new(artifact(Artifact::Bulkhead)?);
                create.args(["image", "create", "--format=qcow2"]);
                ensure!(create.arg(&disk).arg("1M").status()?.success(), "no image");
                // incompatible_features: corrupt.
                File::options().write(true).open(&disk)?.write_all_at(&[2], 79)?;
                with(format!("--disk=path={},format=qcow2", disk.display()))
            },
            &[
                "the corrupt bit",
                "disk[0].path: ",
                "/disk: disk0 (",
                "exited with code 1",
            ],
        ),
        (
            "format_missing",
            exit_code::USAGE,
            |folder| {
                fs::write(folder.join("raw"), [0; 4096])?;
                with(format!("--disk=path={}", folder.join("raw").display()))
            },
            &["disk[0].format"],
        ),
        (
            "memory_too_small",
            exit_code::USAGE,
            |_| with("--memory=1M".to_owned()),
            &["memory: 1M is not between 32M"],
        ),
        (
            "unknown_key",
            exit_code::USAGE,
            |_| with("--disk=pth=x,format=raw".to_owned()),
            &["pth", "path"],
        ),
    ];
    cases
        .into_iter()
        .map(|(name, code, flags, words)| {
            test(format!("bad_input::{name}"), move || refused(flags, code, words))
        })
        .collect()
}

/// `inside/top`, an overlay of what it calls `backing`; beside its folder is `outside`, with a `base`.
fn overlay(folder: &Path, backing: &Path) -> Result<Vec<String>> {
    overlay_of(folder, backing, "raw")
}

fn overlay_of(folder: &Path, backing: &Path, format: &str) -> Result<Vec<String>> {
    let (inside, outside) = (folder.join("inside"), folder.join("outside"));
    fs::create_dir(&inside)?;
    fs::create_dir(&outside)?;
    File::create(outside.join("base"))?.set_len(1 << 20)?;
    let top = inside.join("top");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b"]);
    match create.arg(backing).arg(&top).arg("1M").status() {
        Ok(status) if status.success() => {}
        _ => bail!(Skip("qemu-img is not installed".to_owned())),
    }
    with(format!("--disk=path={},format=qcow2", top.display()))
}

fn kernel(path: &Path) -> String {
    format!("--kernel={}", path.display())
}

fn with(flag: String) -> Result<Vec<String>> {
    Ok(vec![kernel(artifact(Artifact::TinyGuest)?), flag])
}

fn refused(flags: fn(&Path) -> Result<Vec<String>>, code: u8, words: &[&str]) -> Result<()> {
    Host::need_kvm()?;
    let folder = tempfile::tempdir()?;
    says(Run::with_flags(&flags(folder.path())?)?, code, words)
}

/// Refused, soon, with the README's exit code and a message that names the field and the cause, and with no guest
/// started.
pub(crate) fn says(mut run: Run, code: u8, words: &[&str]) -> Result<()> {
    let status = run.wait(DEADLINE)?;
    let message = run.process.stderr()?;
    ensure!(
        status.code() == Some(code.into()),
        "{status}, not {code}: {message}"
    );
    for word in words {
        ensure!(
            message.contains(word),
            "the message does not name {word:?}: {message}"
        );
    }
    // What is told is not logged as well.
    ensure!(!message.contains("ERROR"), "{message}");
    ensure!(
        run.console.text().is_empty(),
        "a guest ran: {}",
        run.console.text()
    );
    Ok(())
}
