//! Typed messages.

/// Names the actor (or template of child actors) that a family of messages goes to.
pub trait Protocol: 'static {
    /// Actor's name in the manifest.
    const ACTOR: &'static str;
}

/// A request with a typed answer.
pub trait Message: Send + Sized + 'static {
    /// Who handles it.
    type To: Protocol;
    /// The answer.
    type Reply: Send + 'static;
    /// `actor.Name`.
    const NAME: &'static str;
    /// May it be delivered twice?
    const IDEMPOTENT: bool;
    /// A copy for redelivery; `None` unless idempotent.
    fn again(&self) -> Option<Self>;
}

/// Implements [`Message`] for the messages of a protocol:
/// `messages! { Content = "content" => { Info -> Option<BlobInfo> as idempotent, Begin -> Writer, } }`.
#[macro_export]
macro_rules! messages {
    ($to:ident = $actor:literal => { $($rest:tt)* }) => { $crate::messages!(@each $to $actor $($rest)*); };
    (@each $to:ident $actor:literal) => {};
    (@each $to:ident $actor:literal $name:ident -> $reply:ty as idempotent, $($rest:tt)*) => {
        impl $crate::Message for $name {
            type To = $to;
            type Reply = $reply;
            const NAME: &'static str = concat!($actor, ".", stringify!($name));
            const IDEMPOTENT: bool = true;
            fn again(&self) -> Option<Self> { Some(self.clone()) }
        }
        $crate::messages!(@each $to $actor $($rest)*);
    };
    (@each $to:ident $actor:literal $name:ident -> $reply:ty, $($rest:tt)*) => {
        impl $crate::Message for $name {
            type To = $to;
            type Reply = $reply;
            const NAME: &'static str = concat!($actor, ".", stringify!($name));
            const IDEMPOTENT: bool = false;
            fn again(&self) -> Option<Self> { None }
        }
        $crate::messages!(@each $to $actor $($rest)*);
    };
}
