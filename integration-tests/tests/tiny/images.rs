//! `bulkhead image`, beside what is compared with qemu-img: how it ends, and what it refuses.

use super::{
    descriptors,
    jails::jail,
    verbs::{bulkhead, expect},
};
use anyhow::{Context, Result, ensure};
use integration_tests::{
    artifacts::Artifact,
    process::Process,
    suite::{artifact, need_jail, test},
};
use libtest_mimic::Trial;
use nix::{
    pty::openpty,
    sys::signal::{Signal, kill},
    unistd::{Pid, getuid},
};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions, Permissions},
    io::Read,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use vm_spec::control::exit_code;

const DEADLINE: Duration = Duration::from_secs(20);
/// On the tool: of its start, and its own.
const FILTERS: u32 = 2;
/// Nobody's ids but those of root's VMs and tools begin here.
const ROOT_RANGES: u32 = 0x7000_0000;
/// Between two looks at a folder.
const LOOK: Duration = Duration::from_millis(2);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("images::an_interrupted_one_is_removed", interrupted),
        test("images::whoever_parses_them_is_jailed", jailed),
        test("images::a_terminal_obeys_no_tool", obeyed),
        test("images::a_check_that_failed_is_no_verdict", unchecked),
        test("images::only_qcow2_has_a_shape", shapeless),
        test("images::snapshots_for_programs", snapshots),
        test("images::no_disk_is_smaller_than_nothing", too_small),
        test("images::a_tool_without_filter_or_answer", unfiltered),
    ]
}

/// Whether files in `folder` can be made without a name.
fn unnamed(folder: &Path) -> bool {
    let made = OpenOptions::new()
        .write(true)
        .custom_flags(nix::libc::O_TMPFILE)
        .open(folder);
    made.is_ok()
}

/// Nobody takes half a copy for a disk, even of a command that was killed; who has the signal ignored gets a whole one.
fn interrupted() -> Result<()> {
    let place = tempfile::tempdir()?;
    let path = |name: &str| place.path().join(name);
    fs::write(path("a.raw"), vec![7; 128 << 20])?;
    for (shell, signal, code) in [
        ("exec \"$@\"", Signal::SIGINT, Some(130)),
        ("exec \"$@\"", Signal::SIGTERM, Some(143)),
        ("exec \"$@\"", Signal::SIGKILL, None),
        ("trap '' HUP; exec \"$@\"", Signal::SIGHUP, Some(0)),
    ] {
        if signal == Signal::SIGKILL && !unnamed(place.path()) {
            println!("a file here has a name from the start, which SIGKILL leaves");
            continue;
        }
        let mut command = Command::new("sh");
        command
            .args(["-c", shell, "sh"])
            .arg(artifact(Artifact::Bulkhead)?)
            .args(["image", "convert"])
            .args([path("a.raw"), path("b.qcow2")]);
        let mut process = Process::start(command)?;
        let stopped = Stopped::at_once(tool_of(&mut process)?)?;
        process.signal(signal)?;
        if code == Some(0) {
            drop(stopped);
        }
        let status = process.wait(DEADLINE)?;
        ensure!(status.code() == code, "{signal}: {status}: {}", process.stderr()?);
        ensure!(
            path("b.qcow2").exists() == (code == Some(0)),
            "{signal}: half a copy"
        );
    }
    Ok(())
}

/// While it copies; it is stopped meanwhile.
fn jailed() -> Result<()> {
    need_jail()?;
    let place = tempfile::tempdir()?;
    let path = |name: &str| place.path().canonicalize().map(|folder| folder.join(name));
    let name = |name: &str| -> Result<String> { Ok(path(name)?.to_string_lossy().into_owned()) };
    fs::write(path("base.raw")?, vec![7; 256 << 20])?;
    let (base, top, target) = (name("base.raw")?, name("top.qcow2")?, name("target.raw")?);
    let create = [
        "image",
        "create",
        "--backing=base.raw",
        "--backing-format=raw",
        &top,
    ];
    expect(&bulkhead(place.path(), &create)?, 0)?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command.args(["image", "convert", &top, &target]);
    let mut process = Process::start(command)?;
    let tool = tool_of(&mut process)?;
    let stopped = Stopped::at_work(tool)?;
    jail(tool, FILTERS)?;
    stranger(tool)?;
    let mut open = descriptors::open(tool)?;
    let said = open.get(&2).cloned().unwrap_or_default();
    ensure!(said.starts_with("pipe:["), "its stderr is {said}");
    ensure!(
        open.remove(&3).is_some_and(|link| link.starts_with("socket:[")),
        "no socket at 3"
    );
    // It has no name yet.
    let written = open.remove(&6).context("no target")?;
    let folder = place.path().canonicalize()?;
    ensure!(
        Path::new(&written).starts_with(folder) && written.ends_with(" (deleted)") == unnamed(place.path()),
        "it writes {written}"
    );
    let expected = [(0, "/dev/null"), (1, &said), (2, &said), (4, &top), (5, &base)];
    let expected = BTreeMap::from(expected.map(|(number, link)| (number, link.to_owned())));
    ensure!(open == expected, "{open:?}, not {expected:?}");
    drop(stopped);
    let status = process.wait(DEADLINE)?;
    ensure!(status.success(), "{status}: {}", process.stderr()?);
    Ok(())
}

/// Where root starts it, it is nobody else outside.
fn stranger(pid: i32) -> Result<()> {
    let root = "         0          0 4294967295\n";
    if !getuid().is_root() || fs::read_to_string("/proc/self/uid_map")? != root {
        return Ok(());
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    for kind in ["Uid:", "Gid:"] {
        let line = status.lines().find_map(|line| line.strip_prefix(kind));
        let ids: Vec<u32> = line
            .context("no ids")?
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        ensure!(ids.iter().all(|id| *id >= ROOT_RANGES), "{kind} {ids:?}");
    }
    Ok(())
}

/// What a tool writes that an image has taken over is shown, not obeyed, and not without end.
fn obeyed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let tool = folder.path().join("bulkhead-image");
    fs::write(&tool, chatterbox())?;
    fs::set_permissions(&tool, Permissions::from_mode(0o755))?;
    fs::write(folder.path().join("a.raw"), [0; 512])?;
    let terminal = openpty(None, None)?;
    let mut command = Command::new(artifact(Artifact::Bulkhead)?);
    command
        .args(["image", "info", "a.raw"])
        .current_dir(folder.path())
        .env("BULKHEAD_BIN_DIR", folder.path())
        .stdout(Stdio::null())
        .stderr(terminal.slave);
    let mut process = command.spawn()?;
    drop(command);
    let mut screen = Vec::new();
    // It ends with an error: nobody has the other side any more.
    let _ = File::from(terminal.master).read_to_end(&mut screen);
    process.wait()?;
    let screen = String::from_utf8_lossy(&screen);
    ensure!(!screen.contains('\u{1b}'), "the terminal was steered");
    ensure!(screen.contains("bulkhead-image: \\u{1b}[2J"), "{screen}");
    ensure!(screen.contains("ended without an answer"), "{screen}");
    ensure!(screen.len() < 64 << 10, "{} bytes", screen.len());
    Ok(())
}

/// The smallest program that would clear the screen, by standard output and error, 4000 times each.
fn chatterbox() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 120;
    const CODE: [u8; 48] = [
        0xBB, 0xA0, 0x0F, 0, 0, // mov ebx, 4000
        0xBF, 1, 0, 0, 0, // mov edi, 1
        0xB8, 1, 0, 0, 0, // write: mov eax, 1
        0x48, 0x8D, 0x35, 26, 0, 0, 0, // lea rsi, [text]
        0xBA, 13, 0, 0, 0, // mov edx, 13
        0x0F, 0x05, // syscall
        0x83, 0xF7, 3, // xor edi, 3: the other one
        0xFF, 0xCB, // dec ebx
        0x75, 0xE6, // jnz write
        0xBF, 0, 0, 0, 0, // mov edi, 0
        0xB8, 0xE7, 0, 0, 0, // mov eax, exit_group
        0x0F, 0x05, // syscall
    ];
    const TEXT: &[u8; 13] = b"\x1b[2J\x1b]0;who\x07\n";
    let length = HEADERS + (CODE.len() + TEXT.len()) as u64;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    // ET_EXEC, EM_X86_64.
    for half in [2_u16, 62] {
        out.extend(half.to_le_bytes());
    }
    out.extend(1_u32.to_le_bytes());
    // e_entry, e_phoff, e_shoff, then e_flags.
    for word in [BASE + HEADERS, 64, 0] {
        out.extend(word.to_le_bytes());
    }
    out.extend(0_u32.to_le_bytes());
    // e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx.
    for half in [64_u16, 56, 1, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    // PT_LOAD, PF_R and PF_X: offset, vaddr, paddr, filesz, memsz, align.
    for word in [1_u32, 5] {
        out.extend(word.to_le_bytes());
    }
    for word in [0, BASE, BASE, length, length, 4096] {
        out.extend(word.to_le_bytes());
    }
    out.extend(CODE);
    out.extend(TEXT);
    out
}

/// The jailed half of a conversion; looking at the images takes others before.
fn tool_of(process: &mut Process) -> Result<i32> {
    let pid = process.pid();
    let end = Instant::now() + DEADLINE;
    loop {
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let converts = |child: &&str| {
            let words = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            words.starts_with(b"bulkhead-image\0convert\0")
        };
        if let Some(child) = children.split_whitespace().find(converts) {
            return Ok(child.parse()?);
        }
        ensure!(process.alive()? && Instant::now() < end, "{}", process.stderr()?);
        thread::sleep(LOOK);
    }
}

/// A process that goes on when this is dropped.
struct Stopped(Pid);

impl Stopped {
    fn at_once(pid: i32) -> Result<Self> {
        let stopped = Self(Pid::from_raw(pid));
        kill(stopped.0, Signal::SIGSTOP)?;
        Ok(stopped)
    }

    /// Once it is under its own filter.
    fn at_work(pid: i32) -> Result<Self> {
        let filters = format!("Seccomp_filters:\t{FILTERS}\n");
        let end = Instant::now() + DEADLINE;
        while !fs::read_to_string(format!("/proc/{pid}/status"))?.contains(&filters) {
            ensure!(Instant::now() < end, "no filter of its own");
            thread::sleep(LOOK);
        }
        Self::at_once(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Fails only where it is gone already.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// 2 says that an image is corrupt, which nobody has looked at.
fn unchecked() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a");
    fs::write(&path, "")?;
    let path = path.to_str().context("no name")?;
    for words in [
        [path].as_slice(),
        &["--bad", path],
        &[path, "--format=dmg"],
        &["b.qcow2"],
        &[],
    ] {
        let words = [&["image", "check"], words].concat();
        expect(&bulkhead(folder.path(), &words)?, exit_code::ERROR)?;
    }
    for (words, code) in [
        (["image", "check", "--help"], 0),
        (["image", "info", path], exit_code::USAGE),
        (["image", "info", "--bad"], exit_code::USAGE),
    ] {
        expect(&bulkhead(folder.path(), &words)?, code)?;
    }
    Ok(())
}

/// What cannot be obeyed is refused, and makes no file.
fn shapeless() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (raw, other) = (path("a.raw"), path("b.raw"));
    for words in [
        ["create", &raw, "10M", "--cluster-size=64K"],
        ["create", &raw, "10M", "--lazy-refcounts"],
    ] {
        let words = [["image"].as_slice(), &words].concat();
        expect(&bulkhead(folder.path(), &words)?, exit_code::USAGE)?;
        ensure!(
            !folder.path().join("a.raw").exists(),
            "{words:?}: a file was made"
        );
    }
    expect(&bulkhead(folder.path(), &["image", "create", &raw, "10M"])?, 0)?;
    let words = ["image", "convert", &raw, &other, "--cluster-size=64K"];
    expect(&bulkhead(folder.path(), &words)?, exit_code::USAGE)?;
    ensure!(!folder.path().join("b.raw").exists(), "a file was made");
    Ok(())
}

fn snapshots() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.qcow2").to_string_lossy().into_owned();
    let image = |words: &[&str]| expect(&bulkhead(folder.path(), &[&["image"], words].concat())?, 0);
    image(&["create", &path, "10M"])?;
    let list = || -> Result<Value> {
        Ok(serde_json::from_str(&image(&[
            "snapshot", "--list", "--json", &path,
        ])?)?)
    };
    ensure!(list()? == serde_json::json!([]), "there are some already");
    image(&["snapshot", "--create=first", &path])?;
    let (alone, info) = (list()?, image(&["info", "--json", &path])?);
    let info: Value = serde_json::from_str(&info)?;
    ensure!(
        alone[0]["name"] == "first" && alone == info["snapshots"],
        "{alone} {info}"
    );
    let words = ["image", "snapshot", "--create=second", "--json", &path];
    expect(&bulkhead(folder.path(), &words)?, exit_code::USAGE)?;
    Ok(())
}

/// A weaker filter is warned of; of a tool that says nothing its end is told.
fn unfiltered() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.raw").to_string_lossy().into_owned();
    fs::write(&path, [0; 512])?;
    for (mode, warns) in [("off", true), ("log", true), ("trap", false), ("enforce", false)] {
        let flag = format!("--seccomp={mode}");
        let output = bulkhead(folder.path(), &["image", "info", &flag, &path])?;
        expect(&output, 0)?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(said.contains(&format!("warning: {flag}: ")) == warns, "{said}");
    }
    // It takes none of the tool's flags.
    fs::copy(
        artifact(Artifact::VhostUserNet)?,
        folder.path().join("bulkhead-image"),
    )?;
    let output = Command::new(artifact(Artifact::Bulkhead)?)
        .args(["image", "info", &path])
        .env("BULKHEAD_BIN_DIR", folder.path())
        .output()?;
    expect(&output, exit_code::ERROR)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        said.contains("it ended without an answer: it exited with code"),
        "{said}"
    );
    Ok(())
}

fn too_small() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("a.qcow2").to_string_lossy().into_owned();
    expect(&bulkhead(folder.path(), &["image", "create", &path, "1G"])?, 0)?;
    let output = bulkhead(folder.path(), &["image", "resize", "--shrink", &path, "-5G"])?;
    expect(&output, exit_code::USAGE)?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("it has 1G"), "{said}");
    Ok(())
}
