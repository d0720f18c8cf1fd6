//! Locks as QEMU's: two writers exclude each other, whichever program each is, and readers share.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::support::{
    Scratch, contents, create, fd, open, open_with, patch, qemu_img_output, read_only, text,
};
use vhost_blk::image::{self, Format, ImageError, OpenOptions};

fn image() -> (Scratch, std::path::PathBuf) {
    let scratch = Scratch::new();
    let path = scratch.path("top");
    create(&path, "", "1M");
    (scratch, path)
}

fn refusal(path: &Path, options: &OpenOptions) -> String {
    let error = open_with(&[(path, Format::Qcow2)], options)
        .err()
        .expect("is refused");
    assert!(matches!(error, ImageError::Locked { .. }), "{error:?}");
    error.to_string()
}

fn two_writers_exclude_each_other() {
    let (_scratch, path) = image();
    let first = open(&[(&path, Format::Qcow2)]);
    let message = refusal(&path, &OpenOptions::default());
    assert!(
        message.contains("in use by another process that writes to it"),
        "{message}"
    );
    refusal(&path, &read_only());
    drop(first);
    drop(open(&[(&path, Format::Qcow2)]));
}

fn readers_share_and_keep_writers_out() {
    let (_scratch, path) = image();
    let readers = [
        open_with(&[(&path, Format::Qcow2)], &read_only()).expect("opens"),
        open_with(&[(&path, Format::Qcow2)], &read_only()).expect("opens"),
    ];
    let message = refusal(&path, &OpenOptions::default());
    assert!(message.contains("relies on its content"), "{message}");
    drop(readers);
    drop(open(&[(&path, Format::Qcow2)]));
}

fn a_dirty_image_is_not_repaired_while_it_is_used() {
    let (_scratch, path) = image();
    patch(&path, 79, &[1]);
    let reader = open_with(&[(&path, Format::Qcow2)], &read_only()).expect("opens");
    let before = contents(&path);
    refusal(&path, &OpenOptions::default());
    assert!(contents(&path) == before, "it was written to");
    drop(reader);
    drop(open(&[(&path, Format::Qcow2)]));
    assert_eq!(contents(&path)[79], 0, "the dirty bit is still set");
}

fn a_backing_file_is_not_written_meanwhile() {
    let (scratch, base) = image();
    let top = scratch.path("overlay");
    create(
        &top,
        &format!("backing_file={},backing_fmt=qcow2", text(&base)),
        "1M",
    );
    let overlay = open(&[(&top, Format::Qcow2), (&base, Format::Qcow2)]);
    refusal(&base, &OpenOptions::default());
    drop(overlay);
    let _writer = open(&[(&base, Format::Qcow2)]);
    let error = open_with(
        &[(&top, Format::Qcow2), (&base, Format::Qcow2)],
        &OpenOptions::default(),
    )
    .err()
    .expect("is refused");
    assert!(
        matches!(&error, ImageError::Backing { depth: 1, source } if matches!(**source, ImageError::Locked { .. })),
        "{error:?}"
    );
}

fn a_successor_on_the_same_description_takes_over() {
    let (_scratch, path) = image();
    let kept = fd(&path, true);
    let duplicate = || kept.try_clone().expect("duplicates");
    let options = OpenOptions::default();
    let first = image::open(duplicate(), Format::Qcow2, Vec::new(), &options).expect("opens");
    drop(first);
    // Nobody has it open now but the launcher, and it is still locked.
    refusal(&path, &options);
    image::open(duplicate(), Format::Qcow2, Vec::new(), &options).expect("opens again");
}

/// As those of a process that was killed, whose io_uring still writes.
fn locks_that_are_about_to_go_are_waited_for() {
    let (_scratch, path) = image();
    let writer = open(&[(&path, Format::Qcow2)]);
    let file = fd(&path, true);
    let refused = image::lock_within(file.as_fd(), false, Duration::from_millis(1));
    assert!(matches!(refused, Err(ImageError::Locked { .. })), "{refused:?}");
    thread::scope(|scope| {
        // Nothing tells that the other thread waits.
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            drop(writer);
        });
        image::lock_within(file.as_fd(), false, Duration::from_secs(20)).expect("locks");
    });
    refusal(&path, &OpenOptions::default());
}

fn qemu_respects_our_locks() {
    let (_scratch, path) = image();
    let check = || qemu_img_output(&["check", "-f", "qcow2", text(&path)]);
    let writer = open(&[(&path, Format::Qcow2)]);
    let output = check();
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("lock"), "{message}");
    drop(writer);
    assert!(check().status.success());
    let _reader = open_with(&[(&path, Format::Qcow2)], &read_only()).expect("opens");
    assert!(check().status.success(), "readers share");
    let output = qemu_img_output(&["resize", "-f", "qcow2", text(&path), "2M"]);
    assert!(!output.status.success(), "a reader keeps QEMU from writing");
}

/// A qemu-io that has the image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn start(path: &Path, args: &[&str]) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .args(["-f", "qcow2", text(path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io runs");
        // The prompt comes once the image is open.
        let mut prompt = [0; 8];
        let stdout = child.stdout.as_mut().expect("is piped");
        stdout.read_exact(&mut prompt).expect("qemu-io opens the image");
        assert_eq!(&prompt, b"qemu-io>");
        Self(child)
    }

    fn end(mut self) {
        let stdin = self.0.stdin.as_mut().expect("is piped");
        stdin.write_all(b"quit\n").expect("qemu-io listens");
        assert!(self.0.wait().expect("ends").success());
    }
}

fn we_respect_the_locks_of_qemu() {
    let (_scratch, path) = image();
    let writer = QemuIo::start(&path, &[]);
    refusal(&path, &OpenOptions::default());
    refusal(&path, &read_only());
    writer.end();
    let reader = QemuIo::start(&path, &["-r"]);
    refusal(&path, &OpenOptions::default());
    drop(open_with(&[(&path, Format::Qcow2)], &read_only()).expect("readers share"));
    reader.end();
    drop(open(&[(&path, Format::Qcow2)]));
}

crate::suite! {
    with_qemu_img: [
        two_writers_exclude_each_other,
        readers_share_and_keep_writers_out,
        a_dirty_image_is_not_repaired_while_it_is_used,
        a_backing_file_is_not_written_meanwhile,
        a_successor_on_the_same_description_takes_over,
        locks_that_are_about_to_go_are_waited_for,
        qemu_respects_our_locks,
        we_respect_the_locks_of_qemu,
    ],
    alone: [],
}
