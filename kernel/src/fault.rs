//! The one error type: containerd's classes and a text that says what failed, on which object, at which step.
use std::fmt::{self, Display};

/// Class of an error, as gRPC and containerd's errdefs have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// Nothing better is known.
    Unknown,
    /// The request is wrong, and always will be.
    InvalidArgument,
    /// The object does not exist.
    NotFound,
    /// It exists already.
    AlreadyExists,
    /// The object is in a state that forbids it.
    FailedPrecondition,
    /// Not allowed.
    PermissionDenied,
    /// Who are you?
    Unauthenticated,
    /// Full: disk, mailbox, descriptors.
    ResourceExhausted,
    /// Beyond the end.
    OutOfRange,
    /// Not built.
    Unimplemented,
    /// Ours.
    Internal,
    /// Try again.
    Unavailable,
    /// Bytes are not what they should be.
    DataLoss,
    /// Too late.
    DeadlineExceeded,
    /// The caller went away.
    Canceled,
    /// Lost a race.
    Aborted,
}

/// An error.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Class.
    pub class: Class,
    /// Text for people.
    pub message: String,
}

/// A result with a [`Fault`].
pub type Result<T, E = Fault> = std::result::Result<T, E>;

macro_rules! constructors { ($($name:ident $class:ident)*) => { impl Fault { $(
    #[doc = concat!("A fault of class `", stringify!($class), "`.")]
    pub fn $name(message: impl Into<String>) -> Fault { Fault::new(Class::$class, message) }
)* } } }
constructors! { unknown Unknown invalid_argument InvalidArgument not_found NotFound already_exists AlreadyExists failed_precondition FailedPrecondition
permission_denied PermissionDenied unauthenticated Unauthenticated resource_exhausted ResourceExhausted out_of_range OutOfRange
unimplemented Unimplemented internal Internal unavailable Unavailable data_loss DataLoss deadline_exceeded DeadlineExceeded
canceled Canceled aborted Aborted }

impl Fault {
    /// A fault.
    pub fn new(class: Class, message: impl Into<String>) -> Fault {
        Fault { class, message: message.into() }
    }
    /// Puts `what` in front of the text.
    pub fn context(mut self, what: impl Display) -> Fault {
        self.message = format!("{what}: {}", self.message);
        self
    }
    /// Is it `NotFound`?
    pub fn is_not_found(&self) -> bool {
        self.class == Class::NotFound
    }
    /// Is it `AlreadyExists`?
    pub fn is_already_exists(&self) -> bool {
        self.class == Class::AlreadyExists
    }
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
impl std::error::Error for Fault {}

impl From<std::io::Error> for Fault {
    fn from(e: std::io::Error) -> Fault {
        use std::io::ErrorKind as K;
        let class = match e.kind() {
            K::NotFound => Class::NotFound,
            K::AlreadyExists => Class::AlreadyExists,
            K::PermissionDenied => Class::PermissionDenied,
            K::StorageFull | K::QuotaExceeded | K::OutOfMemory => Class::ResourceExhausted,
            K::TimedOut => Class::DeadlineExceeded,
            // EMFILE 24, ENFILE 23: no kind of their own.
            _ if matches!(e.raw_os_error(), Some(23 | 24)) => Class::ResourceExhausted,
            _ => Class::Internal,
        };
        Fault::new(class, e.to_string())
    }
}

/// A removal of what is not there has succeeded.
///
/// # Errors
/// Every other error as it is.
pub fn absent(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Context for results.
pub trait ResultExt<T, E> {
    /// Puts `what` in front of the error's text, keeping its class.
    fn context(self, what: impl Display) -> Result<T>
    where
        E: Into<Fault>;
    /// The same, computed only on error.
    fn with_context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>
    where
        E: Into<Fault>;
    /// Makes a [`Fault`] of `class` with `what` in front.
    fn class(self, class: Class, what: impl Display) -> Result<T>
    where
        E: Display;
}
impl<T, E> ResultExt<T, E> for std::result::Result<T, E> {
    fn context(self, what: impl Display) -> Result<T>
    where
        E: Into<Fault>,
    {
        self.map_err(|e| e.into().context(what))
    }
    fn with_context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>
    where
        E: Into<Fault>,
    {
        self.map_err(|e| e.into().context(what()))
    }
    fn class(self, class: Class, what: impl Display) -> Result<T>
    where
        E: Display,
    {
        self.map_err(|e| Fault::new(class, format!("{what}: {e}")))
    }
}
